"""Says what a host of the demonstration is."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

from esper_fn._sites import NoSeeds, Seeds, Site
from esper_fn._typing import Array, Key, Params
from esper_fn.blueprints._base import Blueprint


class Apply(Protocol):
    """Runs a host."""

    def __call__(self, params: Params, seeds: Seeds | NoSeeds, inputs: Array) -> Array:
        """Returns the logits."""
        ...


class Fold(Protocol):
    """Folds an adapter into a host's own parameters."""

    def __call__(
        self, params: Params, site: str, blueprint: Blueprint, adapter: Params, scale: float, /
    ) -> Params | None:
        """Returns parameters of the same function without the adapter, or None."""
        ...


class Host(NamedTuple):
    """A small network with sites: `(init, apply)` and its properties."""

    name: str
    init: Any
    """`init(key) -> params`."""
    apply: Apply
    sites: tuple[Site, ...]
    flops: int
    """Forward operations on one example."""
    fold: Fold | None = None
    """Folds adapters into the parameters for good."""


def count_parameters(host: Host) -> int:
    """Counts the parameters of the host alone.

    >>> from esper_fn.demo import hosts
    >>> count_parameters(hosts.mlp((2, 3, 2)))
    17
    """
    shapes = jax.eval_shape(host.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def dense_init(key: Key, inputs: int, outputs: int, gain: float = 2.0) -> dict[str, Array]:
    """Draws weights with variance `gain / inputs` (He et al., ICCV 2015), and a zero bias."""
    weight = jax.random.normal(key, (inputs, outputs)) * (gain / inputs) ** 0.5
    return {"weight": weight, "bias": jax.numpy.zeros((outputs,))}


def dense(layer: dict[str, Array], x: Array) -> Array:
    """Computes `x weight + bias`."""
    y = x @ layer["weight"].astype(x.dtype)
    return y + layer["bias"].astype(x.dtype).reshape(*(1,) * (y.ndim - 1), -1)
