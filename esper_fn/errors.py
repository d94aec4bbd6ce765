"""The errors of Esper-fn, drawn as one tree.

::

    EsperError
    ├── DataError
    │   ├── UnknownDatasetError   (also ValueError)
    │   ├── MissingDataError      (also FileNotFoundError)
    │   └── CorruptDataError      (also ValueError)
    ├── UnknownNameError          (also ValueError)
    ├── LayoutError              (also ValueError)
    ├── CommandError              (also ValueError)
    ├── RunFolderError            (also ValueError)
    ├── CheckpointError           (also ValueError)
    │   ├── CorruptCheckpointError
    │   ├── NoCheckpointError     (also FileNotFoundError)
    │   ├── UnreadableCheckpointError
    │   └── ResumeError
    ├── BusError
    │   ├── BusAddressError       (also ValueError)
    │   ├── BusSecurityError      (also ValueError)
    │   ├── BusUnavailableError   (also ConnectionError)
    │   ├── BusyError
    │   ├── FencedError
    │   ├── LeaseHeldError
    │   ├── NobodyListensError
    │   ├── NoOutcomeError        (also TimeoutError)
    │   └── MessageError          (also ValueError)
    │       ├── OversizedError
    │       ├── ReplayedError
    │       ├── UndecodableError
    │       ├── UnsupportedVersionError
    │       └── ForgedError
    ├── RunStoppedError
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


class UnreadableCheckpointError(CheckpointError):
    """A step on disk cannot be read just now: no permission, a failing disk, no free handles."""


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


class LayoutError(EsperError, ValueError):
    """Sites, blueprints and capacity do not fit together, or not to the model."""


class CommandError(EsperError, ValueError):
    """A command that could not be put into arrays."""


class NonFiniteLossError(EsperError, FloatingPointError):
    """The host's loss is not finite and rolling back did not help."""


class BusError(EsperError):
    """Something between a run and those who steer and watch it."""


class BusAddressError(BusError, ValueError):
    """An address of a bus that cannot be one."""


class BusSecurityError(BusError, ValueError):
    """A bus that others could reach, without a key; or a key that is none."""


class BusUnavailableError(BusError, ConnectionError):
    """The bus's server does not answer."""


class BusyError(BusError):
    """More commands wait than the bus keeps; nothing was accepted."""


class FencedError(BusError):
    """Another process has taken over this run's place on the bus.

    Args:
      message: who, and what to do.
      epoch: of the newest lease; 0 where no other process is known to hold one.
    """

    def __init__(self, message: str, epoch: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch


class LeaseHeldError(BusError):
    """Another process drives the run.

    Args:
      holder: name of that process.
      seconds: time until its lease expires.
      epoch: epoch of its lease.
    """

    def __init__(self, holder: str, seconds: float, epoch: int = 0) -> None:
        super().__init__(f"the lease is held by {holder} for {seconds:.1f} s more")
        self.holder = holder
        self.seconds = seconds
        self.epoch = epoch


class NobodyListensError(BusError):
    """No living run has this name."""


class NoOutcomeError(BusError, TimeoutError):
    """A command was accepted, and its outcome did not come in time."""


class MessageError(BusError, ValueError):
    """A message that cannot be sent or taken; `reason` is the word dead letters use."""

    reason = "undecodable"


class OversizedError(MessageError):
    """A message larger than its topic takes."""

    reason = "oversized"


class ReplayedError(MessageError):
    """A copy of a message that was meant for an earlier run."""

    reason = "replayed"


class UndecodableError(MessageError):
    """Bytes that are no message."""


class UnsupportedVersionError(MessageError):
    """A message of a kind or version this side does not know."""

    reason = "unsupported"


class ForgedError(MessageError):
    """A message without a signature, or with one that does not hold."""

    reason = "forged"


class RunStoppedError(EsperError):
    """A run was ended by a command."""


__all__ = [
    "BusAddressError",
    "BusError",
    "BusSecurityError",
    "BusUnavailableError",
    "BusyError",
    "CheckpointError",
    "CommandError",
    "CorruptCheckpointError",
    "CorruptDataError",
    "DataError",
    "EsperError",
    "FencedError",
    "ForgedError",
    "LayoutError",
    "LeaseHeldError",
    "MessageError",
    "MissingDataError",
    "NoCheckpointError",
    "NoOutcomeError",
    "NobodyListensError",
    "NonFiniteLossError",
    "OversizedError",
    "ReplayedError",
    "ResumeError",
    "RunFolderError",
    "RunStoppedError",
    "UndecodableError",
    "UnknownDatasetError",
    "UnknownNameError",
    "UnreadableCheckpointError",
    "UnsupportedVersionError",
]
