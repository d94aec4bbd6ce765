"""Contributions: the held-out loss without an adapter minus the loss with it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from esper_fn._control import vary_as_after
from esper_fn._typing import Array, Bool, Float32, Int32, Scalar
from esper_fn.lifecycle._stages import Stage
from esper_fn.lifecycle._state import SeedState, is_in

_ABLATIONS_AT_ONCE = 8


def seeds_to_ablate(
    seeds: SeedState, max_ablations: int
) -> tuple[Int32[Array, "V"], Bool[Array, "V"]]:
    """The seeds whose contribution a survey should measure, and which of the rows count.

    Seeds in EVALUATING and FINE_TUNING are judged by it; those measured least often come first.

    Args:
      seeds: all rows.
      max_ablations: V, or as many as there are seeds if those are fewer.
    """
    is_judged = is_in(seeds.stage, [Stage.EVALUATING, Stage.FINE_TUNING])
    urgency = jnp.where(is_judged, -seeds.num_contributions.astype(jnp.float32), -jnp.inf)
    urgent, chosen = jax.lax.top_k(urgency, min(max_ablations, seeds.stage.shape[0]))
    return chosen.astype(jnp.int32), urgent > -jnp.inf


def losses_without(
    measure: Callable[[Array], Scalar], chosen: Int32[Array, "V"], count: Int32[Array, ""]
) -> Float32[Array, "V"]:
    """`measure` of the first `count` seeds, a few at once; 0 for the others.

    Args:
      measure: the loss without a seed's adapter.
      chosen: seeds.
      count: how many of them are measured.
    """
    size = min(_ABLATIONS_AT_ONCE, chosen.size)
    padded = jnp.pad(chosen, (0, -chosen.size % size))

    def block(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start, losses = carry
        values = jax.vmap(measure)(jax.lax.dynamic_slice(padded, (start,), (size,)))
        return start + size, jax.lax.dynamic_update_slice(losses, values, (start,))

    zeros = (jnp.zeros_like(count), jnp.zeros(padded.shape, jnp.float32))
    zeros = vary_as_after(block, zeros)
    _, losses = jax.lax.while_loop(lambda carry: carry[0] < count, block, zeros)
    return losses[: chosen.size]
