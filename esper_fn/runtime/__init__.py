"""Running a growing network: the ready step and loop, and the pieces to write one's own.

`steer` and `Steering` need the extra `bus` and are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper_fn.runtime._batches import array_batches
from esper_fn.runtime._compilations import count_compilations
from esper_fn.runtime._enlarge import enlarge
from esper_fn.runtime._events import lifecycle_events, stage_counts
from esper_fn.runtime._fit import fit, fit_host
from esper_fn.runtime._options import FitOptions
from esper_fn.runtime._packing import restore_state, save_state
from esper_fn.runtime._program import compile_fit, compile_fit_host
from esper_fn.runtime._records import Fit, Segment
from esper_fn.runtime._saving import Checkpoints
from esper_fn.runtime._scan import scan_steps
from esper_fn.runtime._signals import termination
from esper_fn.runtime._step import TrainState, init, make_step, make_survey

if TYPE_CHECKING:
    from esper_fn.runtime._steer import steer
    from esper_fn.runtime._steering import Steering


def __getattr__(name: str) -> Any:
    if name in {"Steering", "steer"}:
        from esper_fn.runtime._steer import steer
        from esper_fn.runtime._steering import Steering

        return {"Steering": Steering, "steer": steer}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Checkpoints",
    "Fit",
    "FitOptions",
    "Segment",
    "Steering",
    "TrainState",
    "array_batches",
    "compile_fit",
    "compile_fit_host",
    "count_compilations",
    "enlarge",
    "fit",
    "fit_host",
    "init",
    "lifecycle_events",
    "make_step",
    "make_survey",
    "restore_state",
    "save_state",
    "scan_steps",
    "stage_counts",
    "steer",
    "termination",
]
