"""A Flax NNX module that marks a site of a model with one line."""

from __future__ import annotations

from flax import nnx

from esper_fn._ambient import AnySeeds, grow_ambient
from esper_fn._typing import Array
from esper_fn.blueprints._base import Topology

__all__ = ["Grow"]


class Grow(nnx.Module):  # type: ignore[misc]  # Flax is untyped here
    """A site, as in `nnx.Sequential(nnx.Linear(...), nnx.relu, Grow("hidden", chunks=8), ...)`.

    It has no parameters of its own: adapters are kept in `GrowthState`. It uses the seeds of
    `ef.use_seeds` around the model's call, or those passed as `seeds=`.

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
        """The activation with the site's adapters added.

        Args:
          x: the activation, `[..., D]`.
          source: for a site that reads an earlier activation, that activation.
          seeds: those to use; the seeds in scope when left out.
        """
        return grow_ambient(self.site, x, source, seeds, self.chunks, self.topology)
