"""How much an adapter could do at a place: scores of the gradient's second moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._sites import Moments
from esper_fn._typing import Array, Float32

NUM_DIRECTIONS = 4
"""Singular values that count: what an adapter of this width could use."""
RIDGE = 1e-3
RANK_TOLERANCE = 1e-5
"""Squared singular values under this share of the largest are rounding."""


Result = TypeVar("Result")


def _chunk_by_chunk(function: Callable[[Moments], Result]) -> Callable[[Moments], Result]:
    """Extends a function of one chunk's moments to any leading axes.

    On a CPU the chunks are computed one after the other, under `vmap` too: up to version 0.11.1,
    JAX divides a batch of LAPACK calls among the threads of a pool in which it waits for them
    itself, so that as many batches at once as there are threads wait for ever.
    """
    alone = jax.custom_batching.sequential_vmap(function)

    @wraps(function)
    def mapped(moments: Moments) -> Result:
        leading = moments.num_rows.shape
        flat = _flat(moments)
        result = jax.lax.platform_dependent(flat, cpu=jax.vmap(alone), default=jax.vmap(function))
        return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), result)

    return mapped


class Potentials(NamedTuple):
    """Scores of the chunks of one site; both zero where there is nothing to gain."""

    raw: Float32[Array, "C"]
    """`sum_k sigma_k(E[x dy^T])^2` (Evci et al., GradMax, ICLR 2022); grows with the loss scale."""
    whitened: Float32[Array, "C"]
    """`sum_k sigma_k(E[x x^T]^-1/2 E[x dy^T] E[dy dy^T]^-1/2)^2`, between 0 and
    `NUM_DIRECTIONS`: squared canonical correlations of input and gradient, the expansion score of
    self-expanding networks (Mitchell et al., 2023)."""


@_chunk_by_chunk
def potentials(moments: Moments) -> Potentials:
    """Scores of every chunk, from sums over rows.

    Each `sum_k` runs over the `NUM_DIRECTIONS` largest singular values. Covariances get a ridge of
    `RIDGE` times their mean diagonal, so a dead chunk scores 0 rather than noise.

    Args:
      moments: see `Moments`; any leading axes before the matrices.

    Returns:
      Scores with `moments.num_rows`' shape.
    """
    crossed, _, half = _whiten_inputs(moments)
    right = _factor(moments.dy_dy / _count(moments))
    white = jax.scipy.linalg.solve_triangular(right, jnp.swapaxes(half, -1, -2), lower=True)
    return Potentials(raw=_leading(crossed), whitened=_leading(white))


def potentials_by_site(moments: Sequence[Moments]) -> list[Potentials]:
    """`potentials` of many sites; sites with chunks of one size are computed together.

    Args:
      moments: of each site, with any leading axes.

    Returns:
      Flat scores of each site, `[L * C]`.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, moment in enumerate(moments):
        groups.setdefault(moment.x_dy.shape[-2:], []).append(index)
    scores: dict[int, Potentials] = {}
    for members in groups.values():
        flat = [_flat(moments[index]) for index in members]
        joined = potentials(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *flat))
        ends = np.cumsum([len(moment.num_rows) for moment in flat])[:-1]
        parts = [jnp.split(score, ends) for score in joined]
        scores |= {index: Potentials(*part) for index, *part in zip(members, *parts, strict=True)}
    return [scores[index] for index in range(len(moments))]


def _flat(moments: Moments) -> Moments:
    return Moments(
        moments.num_rows.reshape(-1),
        *(leaf.reshape(-1, *leaf.shape[-2:]) for leaf in moments[1:]),
    )


@_chunk_by_chunk
def directions(moments: Moments) -> Float32[Array, "... F U"]:
    """Where in a chunk's input the next adapter should look.

    With the left singular vectors `u_k` of `E[x x^T]^-1/2 E[x dy^T]`, largest singular value first,
    the columns are

        d_k = c_k E[x x^T]^-1/2 u_k,   c_k such that E[(x . d_k)^2] = trace E[x x^T] / F,

    the mean square that a column of `lecun_normal` gives on this input. An adapter with
    pre-activations `z = x d` and a last matrix of zero gets `E[phi(z) dy^T]` as that matrix's
    gradient; of all uncorrelated `z` of that size these have the largest `|E[z dy^T]|`. It is
    GradMax (Evci et al., ICLR 2022) turned round, from a zero first matrix to a zero last one, with
    its constraint on what the units see rather than on their weights. The score's other factor,
    `E[dy dy^T]^-1/2`, makes places comparable; within one place it would weigh up small gradients.

    Args:
      moments: see `Moments`; any leading axes before the matrices.

    Returns:
      `U = min(NUM_DIRECTIONS, F, G)` columns; zero where float32 cannot tell a direction from
      nothing (a squared singular value under `RANK_TOLERANCE` of the largest), not finite where the
      moments are not. The sign of a column means nothing.
    """
    _, left, white = _whiten_inputs(moments)
    turned = jnp.swapaxes(white, -1, -2)
    inputs, outputs = white.shape[-2:]
    count = min(NUM_DIRECTIONS, inputs, outputs)
    is_tall = inputs > outputs
    gram = _product(turned, white) if is_tall else _product(white, turned)
    squares, vectors = jnp.linalg.eigh(gram)
    squares, vectors = squares[..., ::-1][..., :count], vectors[..., ::-1][..., :count]
    if is_tall:
        vectors = _product(white, vectors)
    along = jax.scipy.linalg.solve_triangular(jnp.swapaxes(left, -1, -2), vectors, lower=False)
    covariance = moments.x_x / _count(moments)
    power = jnp.sum(along * _product(covariance, along), axis=-2, keepdims=True)
    target = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None] / inputs
    is_real = (squares > RANK_TOLERANCE * squares[..., :1])[..., None, :] & (power > 0)
    scale = jnp.sqrt(target / jnp.where(is_real, power, 1.0))
    # What is not finite must show: a comparison would hide it.
    is_unknown = ~jnp.isfinite(squares[..., None, :1])
    return jnp.where(is_real | is_unknown, along * scale, 0.0)


def _count(moments: Moments) -> Array:
    return jnp.maximum(moments.num_rows, 1.0)[..., None, None]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _whiten_inputs(moments: Moments) -> tuple[Array, Array, Array]:
    """`E[x dy^T]`, the Cholesky factor `A` of `E[x x^T]` with its ridge, and `A^-1 E[x dy^T]`.

    Singular values, and `A^-T` times left singular vectors, are those of the symmetric whitening:
    the two differ by a rotation.
    """
    count = _count(moments)
    crossed = moments.x_dy / count
    left = _factor(moments.x_x / count)
    return crossed, left, jax.scipy.linalg.solve_triangular(left, crossed, lower=True)


def _factor(covariance: Array) -> Array:
    width = covariance.shape[-1]
    size = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None] / width
    eye = jnp.eye(width, dtype=covariance.dtype).reshape(
        *(1,) * (covariance.ndim - 2), width, width
    )
    # A chunk without any signal gets the identity: its score is then 0 / 1.
    ridge = jnp.where(size > 0, RIDGE * size, 1.0)
    factor: Array = jnp.linalg.cholesky(covariance + ridge * eye)
    return factor


def _leading(matrix: Array) -> Array:
    """Sum of the largest squared singular values."""
    if min(matrix.shape[-2:]) <= NUM_DIRECTIONS:
        return jnp.sum(jnp.square(matrix), axis=(-2, -1))
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = jnp.swapaxes(matrix, -1, -2)
    squares = jnp.linalg.eigvalsh(matrix @ jnp.swapaxes(matrix, -1, -2))
    return jnp.sum(jnp.maximum(squares[..., -NUM_DIRECTIONS:], 0.0), axis=-1)
