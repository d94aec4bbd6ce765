"""Checkpoints: stop anywhere, lose nothing.

A folder of steps, each written whole or not at all, each verified byte for byte before it is read
back. `docs/checkpoints.md` says what is promised.
"""

from esper_fn.checkpoint._check import check
from esper_fn.checkpoint._files import num_disk_bytes
from esper_fn.checkpoint._folder import inspect, steps
from esper_fn.checkpoint._manifest import VERSION, Manifest
from esper_fn.checkpoint._once import prune, save
from esper_fn.checkpoint._place import exclusive
from esper_fn.checkpoint._restore import Restored, restore
from esper_fn.checkpoint._retention import (
    Context,
    Decision,
    Retention,
    Step,
    best,
    decide,
    every,
    everything,
    latest,
    pinned,
    within_bytes,
)
from esper_fn.checkpoint._structure import from_structure, to_structure
from esper_fn.checkpoint._types import register
from esper_fn.checkpoint._verify import Damage, damages, history, verify
from esper_fn.checkpoint._writer import CheckpointWarning, Writer, warn

__all__ = [
    "VERSION",
    "CheckpointWarning",
    "Context",
    "Damage",
    "Decision",
    "Manifest",
    "Restored",
    "Retention",
    "Step",
    "Writer",
    "best",
    "check",
    "damages",
    "decide",
    "every",
    "everything",
    "exclusive",
    "from_structure",
    "history",
    "inspect",
    "latest",
    "num_disk_bytes",
    "pinned",
    "prune",
    "register",
    "restore",
    "save",
    "steps",
    "to_structure",
    "verify",
    "warn",
    "within_bytes",
]
