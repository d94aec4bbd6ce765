"""Ready jobs that compare growth with its honest rivals."""

from esper_fn.demo.jobs._checkpoints import Keeping, StoppedError
from esper_fn.demo.jobs._compare import (
    SURVEY_EVERY,
    Arm,
    Comparison,
    evaluator,
    loss_of,
    prepare,
    run,
)
from esper_fn.demo.jobs._export import FORMATS, export_run
from esper_fn.demo.jobs._jobs import (
    POLICIES,
    Job,
    equal_parameters,
    growth_arguments,
    job,
    names,
    policy,
)
from esper_fn.demo.jobs._progress import Progress
from esper_fn.demo.jobs._summary import intervals, mean_interval, summary

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
    "growth_arguments",
    "intervals",
    "job",
    "loss_of",
    "mean_interval",
    "names",
    "policy",
    "prepare",
    "run",
    "summary",
]
