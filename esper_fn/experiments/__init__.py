"""Ready jobs that compare growth with its honest rivals."""

from esper_fn.experiments._compare import (
    SURVEY_EVERY,
    Arm,
    Comparison,
    evaluator,
    loss_of,
    prepare,
    run,
)
from esper_fn.experiments._export import FORMATS, export_run
from esper_fn.experiments._jobs import (
    POLICIES,
    Job,
    equal_parameters,
    job,
    layout_of,
    names,
    policy,
)
from esper_fn.experiments._keeping import Keeping, StoppedError
from esper_fn.experiments._progress import Progress
from esper_fn.experiments._summary import intervals, mean_interval, summary

__all__ = [
    "FORMATS",
    "POLICIES",
    "SURVEY_EVERY",
    "Arm",
    "Comparison",
    "Job",
    "Keeping",
    "Progress",
    "StoppedError",
    "equal_parameters",
    "evaluator",
    "export_run",
    "intervals",
    "job",
    "layout_of",
    "loss_of",
    "mean_interval",
    "names",
    "policy",
    "prepare",
    "run",
    "summary",
]
