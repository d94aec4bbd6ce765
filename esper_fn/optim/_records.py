"""What goes into an optimiser of adapters, and its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from esper_fn._records import record
from esper_fn._typing import Adapters, Array, Bool, Int32, Params


class Slots(NamedTuple):
    """What an optimiser must know of a bank's slots."""

    generation: Int32[Array, "P"]
    """Adapters born there so far: where it rose, the optimiser state starts afresh."""
    learns: Bool[Array, "P"]
    """Receives updates; the others stand still, optimiser state included."""


@record
class PerAdapterState(NamedTuple):
    """Optimiser state of the host, and of every adapter on its own."""

    host: optax.OptState
    adapters: Mapping[str, Mapping[str, optax.OptState]]
    num_updates: Int32[Array, ""]
    """Of the run so far: the clock of the adapters' schedules."""
    generation: Mapping[str, Mapping[str, Int32[Array, "P"]]]
    """`Slots.generation` at the last update: which adapter each state belongs to."""


class _Remedy(type):
    """A type whose name is a message: JAX prints it where two trees do not match."""

    def __repr__(cls) -> str:
        return (
            "gradients of adapters, which only an optimiser from ef.optim.per_adapter takes: a "
            "plain Optax transformation hands the moments of a dead adapter to a newborn one. "
            "For a wrapper around per_adapter, such as optax.MultiSteps, and to sum gradients up, "
            "make plain trees of them with `ef.optim.plain_gradients(gradients)`"
        )


class AdapterGradients(dict[str, Any], metaclass=_Remedy):
    """What `Growth.value_and_grad` returns for the adapters: site -> blueprint -> `[P, ...]`.

    A dictionary, but to JAX another kind of tree than the adapters themselves: so a plain Optax
    transformation refuses them, whose state would outlive the adapters.
    """


jax.tree_util.register_pytree_with_keys(
    AdapterGradients,
    lambda tree: (
        [(jax.tree_util.DictKey(name), tree[name]) for name in sorted(tree)],
        tuple(sorted(tree)),
    ),
    lambda names, leaves: AdapterGradients(zip(names, leaves, strict=True)),
)


def plain_gradients(gradients: tuple[Params, Adapters]) -> tuple[Params, Adapters]:
    """The gradients of host and adapters as trees of the same kind as the parameters.

    An Optax wrapper around `per_adapter` that keeps gradients, or returns zeros in their place,
    needs them: `optax.MultiSteps`, `optax.apply_if_finite`. Without a `per_adapter` inside, an
    Optax transformation would hand the moments of a dead adapter to a newborn one.

    Args:
      gradients: `(d_params, d_adapters)` of `Growth.value_and_grad`.

    Returns:
      The same pair, with a plain dictionary of adapters.
    """
    return gradients[0], dict(gradients[1])
