"""What an alpha schedule is."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from esper_fn._typing import Array, Bool, Float32


class Observation(NamedTuple):
    """What a schedule may react to; one value a seed."""

    is_spike: Bool[Array, "S"]
    """The training loss left its usual band in this step, or was not finite."""
    loss_trend: Float32[Array, "S"]
    """`(fast - slow) / |slow|` of the loss averages; negative while the loss falls."""
    drift: Float32[Array, "S"]
    """`|change of the adapter| / |adapter|` in this step."""
    gradient_ratio: Float32[Array, "S"]
    """This step's gradient norm over its average; 1 is usual."""
    stability: Float32[Array, "S"]
    """Averaged share of calm steps."""


class Init(Protocol):
    """The state of a schedule."""

    def __call__(self, num_seeds: int) -> Any:
        """Any pytree of arrays, of two kinds.

        An array without axes is a number of the schedule. All seeds share it, `update` leaves it as
        it is, and a new value compiles nothing anew. An array `[S, ...]` has a row for each seed; a
        seed that begins to graft gets its row of `init` again.
        """
        ...


class Update(Protocol):
    """One step of a schedule."""

    def __call__(
        self, state: Any, observation: Observation, alpha: Float32[Array, "S"]
    ) -> tuple[Any, Float32[Array, "S"]]:
        """The next state and the next alpha of every seed, each computed from its own row alone.

        Only the rows of seeds that are grafted by this schedule in this step are used. The new
        alpha is clipped to [0, 1], and 1 takes the place of what lies less than 1e-5 below it.
        """
        ...


class AlphaSchedule(NamedTuple):
    """How alpha moves from 0 to 1 while an adapter is grafted: `(init, update)` and its bounds."""

    name: str
    init: Init
    update: Update
    max_step: float
    """No update changes alpha by more, up to the rounding at 1."""
    start_alpha: float = 0.0
    """Alpha when a seed begins to graft."""
