"""Esper-fn: networks that grow while they train.

>>> import esper_fn as ef
>>> growth = ef.Growth(
...     sites=[ef.site("hidden", features=256, chunks=16)],
...     blueprints={"low_rank": ef.blueprints.low_rank(rank=8)},
...     capacity=16,
...     policy=ef.policies.plateau(patience=200),
... )

The other public modules are imported by their names: `esper_fn.bus`, `esper_fn.export`,
`esper_fn.monitoring`, `esper_fn.report`, `esper_fn.rollback` and `esper_fn.types`.

Names are loaded when they are first used, so importing the package is quick and the parts that
need no JAX (`bus`, `report`, `errors`) do not load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper_fn._version import __version__

if TYPE_CHECKING:
    from esper_fn import (
        blueprints,
        checkpoint,
        commands,
        errors,
        flax,
        governors,
        grafting,
        lifecycle,
        optim,
        policies,
        runtime,
    )
    from esper_fn._ambient import discover_sites, use_seeds
    from esper_fn._growth import Growth, GrowthState, StepInfo, SurveyInfo
    from esper_fn._sites import NoSeeds, site
    from esper_fn.lifecycle import Stage

_MODULES = (
    "blueprints",
    "checkpoint",
    "commands",
    "errors",
    "flax",
    "governors",
    "grafting",
    "lifecycle",
    "optim",
    "policies",
    "runtime",
)
_NAMES = {
    "Growth": "_growth",
    "GrowthState": "_growth",
    "NoSeeds": "_sites",
    "Stage": "lifecycle",
    "StepInfo": "_growth",
    "SurveyInfo": "_growth",
    "discover_sites": "_ambient",
    "site": "_sites",
    "use_seeds": "_ambient",
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
    "NoSeeds",
    "Stage",
    "StepInfo",
    "SurveyInfo",
    "__version__",
    "blueprints",
    "checkpoint",
    "commands",
    "discover_sites",
    "errors",
    "flax",
    "governors",
    "grafting",
    "lifecycle",
    "optim",
    "policies",
    "runtime",
    "site",
    "use_seeds",
]
