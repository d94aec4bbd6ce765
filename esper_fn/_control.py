"""Control flow in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from esper_fn._typing import Array, Bool

Carry = TypeVar("Carry")


def once_if(is_wanted: Bool[Array, ""], run: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """`run(carry)` where `is_wanted`, else `carry`: a loop of one round or none.

    `jax.lax.cond` would copy every array that a branch hands on untouched; the carry of a loop
    stays in its buffer.
    """

    def once(state: tuple[Bool[Array, ""], Carry]) -> tuple[Bool[Array, ""], Carry]:
        wanted, carry = state
        return jnp.zeros_like(wanted), run(carry)

    return jax.lax.while_loop(lambda state: state[0], once, (is_wanted, carry))[1]
