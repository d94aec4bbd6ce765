"""`potential` for JAX: XLA's batched product, for which no kernel has been built yet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from esper_kernels._dispatch import Choice, choose
from esper_kernels._jax_device import device_name
from esper_kernels.potential._case import PotentialCase, check

Array = jax.Array


def explain(x: Any, dy: Any, is_asked: Any, *, implementation: str = "auto") -> Choice:
    """What `potential` would run for these arguments, and why nothing better.

    The arguments are those of `potential`; for arrays, their `jax.ShapeDtypeStruct` will do.

    Raises:
      ArgumentError: the arguments do not fit together.
      UnavailableError: `implementation` cannot serve them; says why.
    """
    return _choose(check(x, dy, is_asked, device=device_name(x)), implementation)


def _choose(case: PotentialCase, implementation: str) -> Choice:
    del case
    candidates = {"pallas": "no kernel is built", "reference": None}
    return choose("potential", implementation, candidates, framework="jax")


def potential(x: Array, dy: Array, is_asked: Array, *, implementation: str = "auto") -> Array:
    """Squared size of `x^T dy` in each chunk that is asked for, 0 elsewhere.

    Args:
      x: [N, D], bfloat16 or float32; cut into C chunks as `numpy.array_split` does.
      dy: [N, D], as `x`.
      is_asked: [C] bool, such as the chunks whose seeds are dormant.
      implementation: `auto` or `reference`.

    Returns:
      [C] float32.

    Raises:
      ArgumentError: a dtype, rank or size is wrong; names which.

    >>> potential(jnp.ones((3, 4)), jnp.ones((3, 4)), jnp.array([True, False])).tolist()
    [36.0, 0.0]
    """
    case = check(x, dy, is_asked, device=device_name(x))
    _choose(case, implementation)
    wide = jnp.float32

    def sizes(a: Array, b: Array, chunks: int) -> Array:
        a, b = (of.reshape(case.rows, chunks, of.shape[1] // max(chunks, 1)) for of in (a, b))
        product = jnp.einsum("ncf,ncg->cfg", a, b, preferred_element_type=wide)
        return jnp.sum(jnp.square(product), axis=(1, 2))

    cut = case.num_wide * case.width
    parts = [sizes(x[:, :cut], dy[:, :cut], case.num_wide)] if cut else []
    parts.append(sizes(x[:, cut:], dy[:, cut:], case.chunks - case.num_wide))
    return jnp.where(is_asked, jnp.concatenate(parts), jnp.zeros((), wide))
