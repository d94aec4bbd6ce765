"""Loads every room whose states files may name, and makes Optax's known."""

from __future__ import annotations

from types import ModuleType

import optax
import optax.contrib
import optax.transforms

from esper_fn import _growth, rollback
from esper_fn._records import is_named_tuple, name_of, register

ROOMS = (_growth, rollback)
"""They load, directly or not, all types of this package that have `@record`."""


def _register_states(module: ModuleType) -> None:
    for name, kind in sorted(vars(module).items()):
        if is_named_tuple(kind) and name == kind.__name__ and name_of(kind) is None:
            register(kind, f"{module.__name__}.{name}")


for _module in (optax, optax.transforms, optax.contrib):
    _register_states(_module)
