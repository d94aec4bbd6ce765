"""Running a growing network: the ready step and loop, and the pieces to write one's own.

`steer` and `Steering` need the extra `bus` and are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper_fn.runtime._batches import Batches, in_memory
from esper_fn.runtime._carry import Carried, carry_over, enlarge
from esper_fn.runtime._compilations import CompilationCount, count_compilations
from esper_fn.runtime._events import lifecycle_events, stage_counts
from esper_fn.runtime._fit import (
    compile_fit,
    compile_fit_host,
    fit,
    fit_host,
    segment_length,
)
from esper_fn.runtime._records import Fit, Segment
from esper_fn.runtime._ring import live_form, saved_form, saved_parts
from esper_fn.runtime._rollbacks import SnapshotClock, rollback_reports
from esper_fn.runtime._saving import Checkpoints
from esper_fn.runtime._signals import termination
from esper_fn.runtime._step import (
    CompiledFit,
    Learned,
    Step,
    StepParts,
    Survey,
    TrainState,
    init,
    make_step,
    make_step_parts,
    make_survey,
    scan_steps,
)

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
    "Batches",
    "Carried",
    "Checkpoints",
    "CompilationCount",
    "CompiledFit",
    "Fit",
    "Learned",
    "Segment",
    "SnapshotClock",
    "Steering",
    "Step",
    "StepParts",
    "Survey",
    "TrainState",
    "carry_over",
    "compile_fit",
    "compile_fit_host",
    "count_compilations",
    "enlarge",
    "fit",
    "fit_host",
    "in_memory",
    "init",
    "lifecycle_events",
    "live_form",
    "make_step",
    "make_step_parts",
    "make_survey",
    "rollback_reports",
    "saved_form",
    "saved_parts",
    "scan_steps",
    "segment_length",
    "stage_counts",
    "steer",
    "termination",
]
