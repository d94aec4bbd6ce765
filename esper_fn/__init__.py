"""Esper-fn: networks that grow while they train.

>>> import esper_fn as ef
>>> growth = ef.Growth(
...     sites=[ef.site("hidden", features=256, chunks=16)],
...     blueprints={"low_rank": ef.blueprints.low_rank(rank=8)},
...     capacity=16,
...     policy=ef.policies.plateau(patience=200),
... )

Names are loaded when they are first used, so importing the package is quick and the parts that
need no JAX (`report`, `errors`) do not load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper_fn._version import __version__

if TYPE_CHECKING:
    from esper_fn import (
        base,
        blueprints,
        bus,
        checkpoint,
        commands,
        errors,
        export,
        flax,
        governors,
        grafting,
        lifecycle,
        monitoring,
        optim,
        policies,
        report,
        rollback,
        runtime,
    )
    from esper_fn._ambient import discover_sites, use_seeds
    from esper_fn._growth import Growth, GrowthState, StepInfo, SurveyInfo
    from esper_fn._layout import Layout
    from esper_fn._sites import NoSeeds, Seeds, Site, Statistics, site
    from esper_fn.lifecycle import Seed, SeedState, Stage

_MODULES = (
    "base",
    "blueprints",
    "bus",
    "checkpoint",
    "commands",
    "errors",
    "export",
    "flax",
    "governors",
    "grafting",
    "lifecycle",
    "monitoring",
    "optim",
    "policies",
    "report",
    "rollback",
    "runtime",
)
_NAMES = {
    "NoSeeds": "_sites",
    "Growth": "_growth",
    "GrowthState": "_growth",
    "StepInfo": "_growth",
    "Layout": "_layout",
    "Statistics": "_sites",
    "Seed": "lifecycle",
    "SeedState": "lifecycle",
    "Seeds": "_sites",
    "Site": "_sites",
    "Stage": "lifecycle",
    "SurveyInfo": "_growth",
    "discover_sites": "_ambient",
    "use_seeds": "_ambient",
    "site": "_sites",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _NAMES:
        value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


__all__ = [
    "Growth",
    "GrowthState",
    "Layout",
    "NoSeeds",
    "Seed",
    "SeedState",
    "Seeds",
    "Site",
    "Stage",
    "Statistics",
    "StepInfo",
    "SurveyInfo",
    "__version__",
    "base",
    "blueprints",
    "bus",
    "checkpoint",
    "commands",
    "discover_sites",
    "errors",
    "export",
    "flax",
    "governors",
    "grafting",
    "lifecycle",
    "monitoring",
    "optim",
    "policies",
    "report",
    "rollback",
    "runtime",
    "site",
    "use_seeds",
]
