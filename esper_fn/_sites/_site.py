"""Activations of a host model where adapters can grow."""

from __future__ import annotations

from dataclasses import dataclass

from esper_fn._arguments import is_count
from esper_fn.blueprints._base import TOPOLOGIES, AdapterSpec, Topology
from esper_fn.errors import LayoutError
from esper_kernels import Chunking


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One activation of the host whose last axis is split into chunks, one seed each.

    Make one with `site`, which says what each attribute is.
    """

    name: str
    features: int
    chunks: int = 1
    topology: Topology = "vector"
    source_features: int | None = None
    layers: int | None = None
    positions: int = 1

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise LayoutError(f"a site needs a non-empty name, got {self.name!r}")
        sizes = {"features": self.features, "chunks": self.chunks, "positions": self.positions}
        optional = {"source_features": self.source_features, "layers": self.layers}
        sizes |= {field: value for field, value in optional.items() if value is not None}
        for field, value in sizes.items():
            if not is_count(value):
                raise LayoutError(
                    f"site {self.name!r}: {field} must be a positive int, got {value!r}"
                )
        narrowest = min(self.features, self.source_features or self.features)
        if self.chunks > narrowest:
            raise LayoutError(
                f"site {self.name!r}: {self.chunks} chunks do not fit {narrowest} features; "
                f"choose at most {narrowest} chunks"
            )
        if self.topology not in TOPOLOGIES:
            raise LayoutError(
                f"site {self.name!r}: topology must be one of {TOPOLOGIES}, got {self.topology!r}; "
                "it is `image` for [..., H, W, D] (convolutions too), `sequence` for [..., T, D], "
                "else `vector`"
            )

    @property
    def is_span(self) -> bool:
        """Whether it reads another activation than it writes."""
        return self.source_features is not None

    @property
    def target(self) -> Chunking:
        """Split of the activation it writes."""
        return Chunking(self.features, self.chunks)

    @property
    def source(self) -> Chunking:
        """Split of the activation it reads."""
        return Chunking(self.source_features or self.features, self.chunks)

    @property
    def spec(self) -> AdapterSpec:
        """What an adapter here reads and writes."""
        return AdapterSpec(self.source.widest, self.target.widest, self.topology)

    @property
    def num_layers(self) -> int:
        """L, or 1."""
        return self.layers or 1

    @property
    def num_seeds(self) -> int:
        """Seeds of all layers."""
        return self.num_layers * self.chunks


def site(
    name: str,
    *,
    features: int,
    source_features: int | None = None,
    chunks: int = 1,
    topology: Topology = "vector",
    layers: int | None = None,
    positions: int = 1,
) -> Site:
    """Describes an activation of the host where adapters can grow.

    With `source_features` the site is a *span*: its adapters read one activation and write into a
    later one. Around a hidden layer, from its input to its successor's pre-activation, a
    `bottleneck` adapter is exactly "more neurons in that layer".

    Args:
      name: what `seeds.grow` calls it.
      features: width D of the activation that adapters write to.
      source_features: for a span, the width of the earlier activation that they read.
      chunks: number of seeds C along the features; the split is `numpy.array_split`'s.
      topology: `vector` (`[..., D]`), `sequence` (`[..., T, D]`) or `image` (`[..., H, W, D]`).
      layers: for a site inside a scanned stack of L identical blocks, L; each has its own seeds.
      positions: positions of one example (T, or H * W), for counting operations.

    Raises:
      LayoutError: a number that is not positive, more chunks than features, another topology.

    >>> site("hidden", features=10, chunks=3).target.sizes.tolist()
    [4, 3, 3]
    >>> site("over", source_features=64, features=32).spec.outputs
    32
    """
    return Site(
        name=name,
        features=features,
        chunks=chunks,
        topology=topology,
        source_features=source_features,
        layers=layers,
        positions=positions,
    )
