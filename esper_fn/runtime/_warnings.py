"""Warnings of `fit`, each at most once a run, where growth cannot help."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from esper_fn._growth import Growth, GrowthState, StepInfo
from esper_fn.lifecycle import Stage


def warn_of_barren(growth: Growth, infos: StepInfo, first: int, record: dict[str, Any]) -> None:
    """Warns where nothing will grow, since all is zero there."""
    steps = np.flatnonzero(np.asarray(infos.num_barren))
    if record.get("has_warned") or not steps.size:
        return
    record["has_warned"] = True
    row = int(steps[-1])
    is_dormant = infos.stage[row] == Stage.DORMANT
    seeds = np.flatnonzero(is_dormant & infos.is_measured[row] & (infos.evidence[row] == 0))
    rows = [growth.layout.locate(int(seed)) for seed in seeds[:5]]
    names = ", ".join(f"{site.name!r} chunk {chunk}" for site, _, chunk in rows)
    warnings.warn(
        f"step {first + row}: {int(infos.num_barren[row])} dormant seed(s) measure a growth "
        f"potential of exactly zero ({names}{', ...' if len(seeds) > 5 else ''}): the activation "
        "is always zero there, or no gradient reaches it, so nothing will grow there; "
        "look for dead units or an unused output, or leave the site out of the layout",
        RuntimeWarning,
        stacklevel=6,
    )


def warn_of_blind(growth: GrowthState, first: int, record: dict[str, Any]) -> None:
    """Warns of surveys that measure nothing at all, so that nothing is judged by them."""
    if record.get("has_looked"):
        return
    record["has_looked"] = True
    if np.asarray(growth.seeds.num_potentials).any():
        return
    warnings.warn(
        f"step {first}: the survey measured no growth potential at any site, so it will judge "
        "nothing; the loss on survey_batch is not finite, or no site takes part in it: look for "
        "NaN or infinity in survey_batch",
        RuntimeWarning,
        stacklevel=6,
    )
