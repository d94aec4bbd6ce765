"""How fast a trained adapter is let into the host: six schedules of one type."""

from esper_fn.errors import UnknownNameError
from esper_fn.grafting._strategies import (
    ROUNDING,
    Evidence,
    Graft,
    adaptive,
    drift_controlled,
    grad_norm_gated,
    linear,
    momentum,
    ramp,
    stability,
    start_alpha,
    start_memory,
)

_FACTORIES = {
    "linear": linear,
    "drift_controlled": drift_controlled,
    "momentum": momentum,
    "adaptive": adaptive,
    "stability": stability,
    "grad_norm_gated": grad_norm_gated,
}


def names() -> tuple[str, ...]:
    """The strategies' names."""
    return tuple(_FACTORIES)


def get(name: str, num_steps: int = 100) -> Graft:
    """The strategy called `name`; raises `UnknownNameError`.

    >>> get("linear", 10).name
    'linear'
    """
    if name not in _FACTORIES:
        raise UnknownNameError("grafting strategy", name, names())
    return _FACTORIES[name](num_steps)


__all__ = [
    "ROUNDING",
    "Evidence",
    "Graft",
    "adaptive",
    "drift_controlled",
    "get",
    "grad_norm_gated",
    "linear",
    "momentum",
    "names",
    "ramp",
    "stability",
    "start_alpha",
    "start_memory",
]
