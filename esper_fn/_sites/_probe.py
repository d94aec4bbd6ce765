"""The survey's probe: second moments of a chunk's input and of its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._sites._chunks import split
from esper_fn._typing import Array, Float32
from esper_kernels import Chunking


class Moments(NamedTuple):
    """Second moments of a chunk's input and of its gradient, summed over rows."""

    num_rows: Float32[Array, "C"]
    x_dy: Float32[Array, "C F G"]
    x_x: Float32[Array, "C F F"]
    dy_dy: Float32[Array, "C G G"]


def zero_moments(source: Chunking, target: Chunking, layers: int | None) -> Moments:
    """The probe's tap for a site, with a leading axis of layers where it has layers."""
    stack = () if layers is None else (layers,)
    chunks, inputs, outputs = source.chunks, source.widest, target.widest
    return Moments(
        num_rows=jnp.zeros((*stack, chunks), jnp.float32),
        x_dy=jnp.zeros((*stack, chunks, inputs, outputs), jnp.float32),
        x_x=jnp.zeros((*stack, chunks, inputs, inputs), jnp.float32),
        dy_dy=jnp.zeros((*stack, chunks, outputs, outputs), jnp.float32),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def probe(
    chunkings: tuple[Chunking, Chunking], source: Array, target: Array, tap: Moments
) -> Array:
    """The identity on `target`, whose tap receives the moments of `source` and of the gradient."""
    del source, tap
    return target


def _fwd(chunkings: tuple[Chunking, Chunking], source: Array, target: Array, tap: Moments) -> Any:
    del tap
    return target, source


def _rows(x: Array, chunking: Chunking) -> Float32[Array, "C N F"]:
    rows = x.reshape(-1, chunking.features).astype(jnp.float32)
    return jnp.moveaxis(split(rows, chunking), 0, 1)


def _bwd(chunkings: tuple[Chunking, Chunking], source: Array, dy: Array) -> Any:
    x, slope = _rows(source, chunkings[0]), _rows(dy, chunkings[1])

    def product(a: Array, b: Array) -> Array:
        return jnp.einsum("cnf,cng->cfg", a, b, precision="highest")

    moments = Moments(
        num_rows=jnp.full_like(x, x.shape[1], shape=(x.shape[0],)),
        x_dy=product(x, slope),
        x_x=product(x, x),
        dy_dy=product(slope, slope),
    )
    return jnp.zeros_like(source), dy, moments


probe.defvjp(_fwd, _bwd)
