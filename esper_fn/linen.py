"""A Flax Linen module that places a site in a model with one line."""

from __future__ import annotations

import flax.linen as nn

from esper_fn._ambient import AnySeeds, grow_here
from esper_fn._typing import Array
from esper_fn.base import Topology


class Grow(nn.Module):  # type: ignore[misc]  # Flax is untyped here
    """`x = Grow("hidden", chunks=8)(x)`: a place where networks can grow.

    It has no parameters of its own: adapters live in the growth's state. Which seeds it uses is
    said by `ef.use_seeds` around the model's call, or by `seeds=`.

    Attributes:
      site: the site's name.
      chunks: seeds along the features, for `ef.discover_sites`.
      topology: what the activation is, for `ef.discover_sites`.
    """

    site: str
    chunks: int = 1
    topology: Topology = "vector"

    def __call__(
        self, x: Array, *, source: Array | None = None, seeds: AnySeeds | None = None
    ) -> Array:
        """The activation with the site's adapters added."""
        return grow_here(self.site, x, source, seeds, self.chunks, self.topology)
