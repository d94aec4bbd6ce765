"""Compares growth with its rivals in ready jobs.

>>> from esper_fn.demo import data, jobs
>>> comparison = jobs.prepare(jobs.get("digits"), data.load("digits"))
>>> comparison.steps, comparison.growth.layout.num_seeds
(1500, 27)
"""

from esper_fn.demo.jobs._checkpoints import ArmCheckpoints, StoppedError
from esper_fn.demo.jobs._compare import SURVEY_EVERY, ArmResult, Comparison, prepare, run
from esper_fn.demo.jobs._evaluate import make_evaluate, make_loss
from esper_fn.demo.jobs._export import FORMATS, export_run
from esper_fn.demo.jobs._jobs import POLICIES, Job, get, names, static_host
from esper_fn.demo.jobs._progress import Progress
from esper_fn.demo.jobs._summary import intervals, mean_interval, summarize

__all__ = [
    "FORMATS",
    "POLICIES",
    "SURVEY_EVERY",
    "ArmCheckpoints",
    "ArmResult",
    "Comparison",
    "Job",
    "Progress",
    "StoppedError",
    "export_run",
    "get",
    "intervals",
    "make_evaluate",
    "make_loss",
    "mean_interval",
    "names",
    "prepare",
    "run",
    "static_host",
    "summarize",
]
