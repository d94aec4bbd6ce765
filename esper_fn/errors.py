"""The errors of Esper-fn, drawn as one tree.

::

    EsperError
    ├── DataError
    │   ├── UnknownDatasetError   (also ValueError)
    │   ├── MissingDataError      (also FileNotFoundError)
    │   └── CorruptDataError      (also ValueError)
    ├── UnknownNameError          (also ValueError)
    ├── LatticeError              (also ValueError)
    ├── CommandError              (also ValueError)
    ├── RunFolderError            (also ValueError)
    ├── CheckpointError           (also ValueError)
    │   ├── CorruptCheckpointError
    │   ├── NoCheckpointError     (also FileNotFoundError)
    │   └── ResumeError
    └── NonFiniteLossError        (also FloatingPointError)

Every message names the value, what is allowed, and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable


class EsperError(Exception):
    """Root of every error that Esper-fn raises on the host."""


class DataError(EsperError):
    """A dataset could not be loaded."""


class UnknownDatasetError(DataError, ValueError):
    """No dataset has this name."""


class MissingDataError(DataError, FileNotFoundError):
    """A dataset's file lies in none of the folders that were tried."""


class CorruptDataError(DataError, ValueError):
    """A dataset's file is not the published one, or does not hold what its format promises."""


class RunFolderError(EsperError, ValueError):
    """A run folder cannot be made or written, or does not hold a run."""


class CheckpointError(EsperError, ValueError):
    """A checkpoint cannot be written, read, or put where it is asked to go."""


class CorruptCheckpointError(CheckpointError):
    """A step on disk is not, byte for byte, what was acknowledged."""


class NoCheckpointError(CheckpointError, FileNotFoundError):
    """There is no step to restore."""


class ResumeError(CheckpointError):
    """A run was to be resumed with other settings than it was begun with."""


class UnknownNameError(EsperError, ValueError):
    """A name that is none of the allowed ones.

    Args:
      kind: what was named, e.g. `site`.
      name: what was asked for.
      allowed: the names there are.
      remedy: what else the caller can do.
    """

    def __init__(self, kind: str, name: object, allowed: Iterable[str], remedy: str = "") -> None:
        choices = ", ".join(sorted(allowed)) or "none"
        super().__init__(
            f"unknown {kind} {name!r}; allowed: {choices}" + (f"; {remedy}" if remedy else "")
        )


class LatticeError(EsperError, ValueError):
    """Sites, blueprints and capacity do not fit together, or not to the model."""


class CommandError(EsperError, ValueError):
    """A command that could not be put into arrays."""


class NonFiniteLossError(EsperError, FloatingPointError):
    """The host's loss is not finite and rolling back did not help."""
