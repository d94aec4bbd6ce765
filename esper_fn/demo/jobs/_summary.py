"""Summarizes the rows of several runs, with intervals."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from esper_fn.demo.jobs._compare import Comparison
from esper_fn.report._words import ACCURACY_KEY, DIFFERENCE_KEY


def intervals(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Takes means over runs with 95 % intervals; differences are paired by seed.

    Args:
      rows: from `run`, one a seed.

    Returns:
      Name of an accuracy or a difference -> `mean`, `low` and `high`.
    """
    columns = {
        name: np.asarray([row[name] for row in rows], np.float64) for name in ACCURACY_KEY.values()
    }
    for rival, name in DIFFERENCE_KEY.items():
        columns[name] = columns[ACCURACY_KEY["grown"]] - columns[ACCURACY_KEY[rival]]
    return {name: mean_interval(values) for name, values in columns.items()}


# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom; beyond that the normal's.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """Takes the mean of values and its 95 % interval (Student's t).

    Args:
      values: `[N]`, at least one.

    Returns:
      `mean`, `low` and `high`.

    >>> mean_interval(np.asarray([1.0, 3.0]))["mean"]
    2.0
    """
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return {"mean": mean, "low": mean, "high": mean}
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.96
    half = quantile * float(values.std(ddof=1)) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarize(comparison: Comparison, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes the summary of a run folder.

    Args:
      comparison: from `prepare`.
      rows: from `run`, one a seed.

    Returns:
      The first row with what all rows share; several rows are its repeats, with intervals.
    """
    return {
        "schema": 1,
        "data": comparison.job.data,
        "host": comparison.host.name,
        "task": comparison.data.task,
        "steps": comparison.steps,
        "policy": comparison.policy_name,
        **rows[0],
        "wall_seconds": sum(row["wall_seconds"] for row in rows),
        "recompilations_after_first_step": sum(
            row["recompilations_after_first_step"] for row in rows
        ),
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("esper-fn", "jax", "jaxlib", "flax", "optax", "numpy")
            },
        },
        "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "repeats": None
        if len(rows) == 1
        else {"count": len(rows), "rows": rows, "intervals": intervals(rows)},
    }
