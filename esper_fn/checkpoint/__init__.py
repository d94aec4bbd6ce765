"""Checkpoints: stop anywhere, lose nothing.

A folder of steps, each written whole or not at all, each verified byte for byte before it is read
back. `docs/checkpoints.md` says what is promised.
"""

from esper_fn._records import register
from esper_fn.checkpoint import _types as _types
from esper_fn.checkpoint._folder import steps
from esper_fn.checkpoint._restore import Restored, restore
from esper_fn.checkpoint._retention import (
    Decision,
    Retention,
    best,
    every,
    everything,
    latest,
    pinned,
    within_bytes,
)
from esper_fn.checkpoint._verify import Damage, verify
from esper_fn.checkpoint._writer import CheckpointWarning, Writer, check, prune, save

__all__ = [
    "CheckpointWarning",
    "Damage",
    "Decision",
    "Restored",
    "Retention",
    "Writer",
    "best",
    "check",
    "every",
    "everything",
    "latest",
    "pinned",
    "prune",
    "register",
    "restore",
    "save",
    "steps",
    "verify",
    "within_bytes",
]
