"""What a blueprint is."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, TypeAlias

from esper_fn._typing import Array, Bool, DType, Float, Float32, Key, Params
from esper_kernels import Activation

Topology: TypeAlias = Literal["vector", "sequence", "image"]
TOPOLOGIES: tuple[Topology, ...] = ("vector", "sequence", "image")


class AdapterSpec(NamedTuple):
    """What an adapter reads and writes."""

    inputs: int
    """Features it reads (of the widest chunk)."""
    outputs: int
    """Features it writes; differs from `inputs` only over a span."""
    topology: Topology


class Cost(NamedTuple):
    """What one adapter costs."""

    parameters: int
    flops: int
    """Floating point operations of one forward pass over one example."""


class InitAdapter(Protocol):
    """Makes the parameters of one adapter."""

    def __call__(self, key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        """Parameters with which `apply` returns exactly zero: a newborn is the identity."""
        ...


class InitAlong(Protocol):
    """Makes the parameters of one adapter whose first matrix looks where a survey says."""

    def __call__(
        self, key: Key, spec: AdapterSpec, dtype: DType, directions: Float32[Array, "F U"]
    ) -> Params:
        """Parameters like `init`'s, with which `apply` returns exactly zero as well.

        `directions` are columns of a first matrix, ready to use: most useful first, scaled so that
        `x @ directions` is as large as `init`'s own pre-activations are on the measured input, zero
        in padded features. A column of zeros is no direction; it, and every inner unit that gets
        none, is filled as `init` does. So with nothing but zeros the result is `init`'s, bit for
        bit.
        """
        ...


class ApplyAdapter(Protocol):
    """Runs one adapter."""

    def __call__(
        self, params: Params, x: Float[Array, "... F"], spec: AdapterSpec, mask: Bool[Array, "F"]
    ) -> Float[Array, "... G"]:
        """The residual `r` of shape `x.shape[:-1] + (outputs,)`, in `x`'s dtype.

        `x` is `[..., F]` for a vector site, `[..., T, F]` for a sequence and `[..., H, W, F]` for
        an image. Where the site's features do not divide evenly, a chunk's last feature may be
        padding: it reads as zero, is False in `mask`, and its output is discarded.
        """
        ...


class CostAdapter(Protocol):
    """States what an adapter costs before one exists."""

    def __call__(self, spec: AdapterSpec, positions: int) -> Cost:
        """Parameters, and forward operations on one example of `positions` positions.

        `positions` is 1 for a vector, `T` for a sequence, `H * W` for an image.
        """
        ...


class Blueprint(NamedTuple):
    """A small network that can grow at a seed: `(init, apply)` and what it states of itself."""

    name: str
    init: InitAdapter
    apply: ApplyAdapter
    cost: CostAdapter
    topologies: tuple[Topology, ...]
    can_span: bool
    """Whether it may read one activation and write into another of a different width."""
    activation: Activation | None = None
    """Names `phi` where `apply` is `phi(x down + bias) up` of a dict with these entries, `bias`
    optional (with `gated`: `silu(x gate) * (x down)` for `phi`), so that GPU kernels may compute
    it. `gelu` is the one by tanh. None leaves it to `apply` everywhere."""
    init_along: InitAlong | None = None
    """For births along a survey's directions (`growth(directed_births=...)`); None where an adapter
    has no first matrix that would profit."""
    neurons: Activation | None = None
    """Names `phi` where what `apply` computes is `phi(x down + bias) up` up to rounding, however it
    is computed: a host may then take a finished adapter in as neurons of a layer of its own."""
