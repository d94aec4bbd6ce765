"""How much a body could do at a place: scores of the gradient's second moments."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._lattice import Moments
from esper_fn._typing import Array, Float32

NUM_DIRECTIONS = 4
"""Singular values that count: what a body of this width could use."""
RIDGE = 1e-3


class Potentials(NamedTuple):
    """Scores of the chunks of one site; both zero where there is nothing to gain."""

    raw: Float32[Array, "C"]
    """`sum_k sigma_k(E[x dy^T])^2` (Evci et al., GradMax, ICLR 2022); grows with the loss scale."""
    whitened: Float32[Array, "C"]
    """`sum_k sigma_k(E[x x^T]^-1/2 E[x dy^T] E[dy dy^T]^-1/2)^2`, between 0 and
    `NUM_DIRECTIONS`: squared canonical correlations of input and gradient, the expansion score of
    self-expanding networks (Mitchell et al., 2023)."""


def potentials(moments: Moments) -> Potentials:
    """Scores of every chunk, from sums over rows.

    Each `sum_k` runs over the `NUM_DIRECTIONS` largest singular values. Covariances get a ridge of
    `RIDGE` times their mean diagonal, so a dead chunk scores 0 rather than noise.

    Args:
      moments: see `Moments`; any leading axes before the matrices.

    Returns:
      Scores with `moments.num_rows`' shape.
    """
    count = jnp.maximum(moments.num_rows, 1.0)[..., None, None]
    crossed = moments.x_dy / count
    left = _factor(moments.x_x / count)
    right = _factor(moments.dy_dy / count)
    half = jax.scipy.linalg.solve_triangular(left, crossed, lower=True)
    white = jax.scipy.linalg.solve_triangular(right, jnp.swapaxes(half, -1, -2), lower=True)
    return Potentials(raw=_leading(crossed), whitened=_leading(white))


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
