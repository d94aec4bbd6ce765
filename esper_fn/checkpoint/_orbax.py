"""The one module that imports Orbax: named arrays to a folder and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from esper_fn.errors import CorruptCheckpointError

# Orbax tells of every save at INFO and warns of each restore without shardings.
logging.getLogger("absl").setLevel(logging.ERROR)


def _checkpointer() -> Any:
    # Trained floats hardly compress.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays into a folder that must not exist; returns when they are in files.

    Raises:
      OSError: or an error of the store beneath Orbax; the disk is full, or read-only, say.
    """
    with _checkpointer() as saver:
        saver.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays)))


def read(
    folder: Path, expected: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
) -> dict[str, np.ndarray]:
    """Reads the arrays of a folder, all of them.

    Args:
      folder: written by `write`.
      expected: shape and dtype of each; what the files say is compared before anything of that
        size is allocated.

    Raises:
      CorruptCheckpointError: other arrays than expected, or Orbax cannot read them.
    """
    with _checkpointer() as reader:
        try:
            tree = reader.metadata(folder.absolute()).item_metadata.tree
            listed = {name: (tuple(row.shape), np.dtype(row.dtype)) for name, row in tree.items()}
            if listed != dict(expected):
                raise CorruptCheckpointError(f"{folder}: Orbax holds other arrays than listed")
            options = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in expected}
            restored = reader.restore(
                folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=options)
            )
        except CorruptCheckpointError:
            raise
        except Exception as error:
            # Whatever is wrong beneath: to the caller the files are not what was written.
            raise CorruptCheckpointError(f"{folder}: Orbax cannot read it: {error}") from error
    return {name: np.asarray(value) for name, value in restored.items()}
