"""A Flax NNX module that places a site in a model with one line."""

from __future__ import annotations

from flax import nnx

from esper_fn._ambient import AnySeeds, grow_here
from esper_fn._typing import Array
from esper_fn.base import Topology


class Grow(nnx.Module):  # type: ignore[misc]  # Flax is untyped here
    """`nnx.Sequential(nnx.Linear(...), nnx.relu, Grow("hidden", chunks=8), ...)`.

    It has no parameters of its own: adapters live in the growth's state. Which seeds it uses is
    said by `ef.use_seeds` around the model's call, or by `seeds=`.

    Args:
      site: the site's name.
      chunks: seeds along the features, for `ef.discover_sites`.
      topology: what the activation is, for `ef.discover_sites`.
    """

    def __init__(self, site: str, *, chunks: int = 1, topology: Topology = "vector") -> None:
        self.site = site
        self.chunks = chunks
        self.topology = topology

    def __call__(
        self, x: Array, *, source: Array | None = None, seeds: AnySeeds | None = None
    ) -> Array:
        """The activation with the site's adapters added."""
        return grow_here(self.site, x, source, seeds, self.chunks, self.topology)
