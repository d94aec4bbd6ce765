"""Where the GPU kernels of `esper_kernels` compute a bank instead of a loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import esper_kernels.jax as kernels
from esper_fn._layout._chunks import place
from esper_fn._layout._rounds import Banks, BankView, Wiring, is_live
from esper_fn._typing import Array, Float32, Int32, Params
from esper_fn.errors import LayoutError
from esper_kernels import Adapter


def divide(wiring: Wiring, banks: Banks, x: Array) -> tuple[list[int], list[int]]:
    """The banks that kernels compute here, and those that loops do.

    Raises:
      UnavailableError: a kernel is forced that cannot serve a bank of its form; says why.
    """
    every = list(range(len(banks)))
    if wiring.implementation == "loops" or wiring.is_span:
        return [], every
    if x.dtype == jnp.float16 or not x.size:
        return [], every
    if wiring.implementation == "auto" and wiring.at_once is None:
        return [], every
    served = [index for index in every if _is_served(wiring, index, banks[index], x)]
    return served, [index for index in every if index not in served]


def _is_served(wiring: Wiring, index: int, bank: BankView, x: Array) -> bool:
    if wiring.blueprints[index].activation is None:
        return False
    if not isinstance(bank.adapters, dict) or not set(bank.adapters) <= set(Adapter._fields):
        raise LayoutError(
            f"blueprint {wiring.blueprints[index].name!r} names an activation, so its parameters "
            f"must be a dict of some of {Adapter._fields}; see `esper_fn.blueprints.check`"
        )
    arrays, options = _call(wiring, index, bank)
    rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
    choice = kernels.explain(rows, *arrays, **options)
    return wiring.implementation != "auto" or choice.implementation != "reference"


def _call(
    wiring: Wiring, index: int, bank: BankView
) -> tuple[tuple[Adapter, Int32[Array, "C"], Float32[Array, "C 3"]], dict[str, Any]]:
    """A kernel's arguments that describe the adapters: matrices, each chunk's slot and gains."""
    placed = place(wiring.target, jnp.where(is_live(bank), bank.chunk, -1))
    slot = jnp.where(placed.is_served, placed.slot, -1)
    gains = jnp.where(placed.is_served[:, None], bank.gains[placed.slot], 0.0)
    options = {
        "activation": wiring.blueprints[index].activation,
        "implementation": wiring.implementation,
    }
    return (Adapter(**bank.adapters), slot, gains), options


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def forward(
    wiring: Wiring, banks: Banks, served: list[int], x: Array
) -> tuple[Array, Float32[Array, "C 5"] | None]:
    """`x` with the served banks' adapters added, and what the first of them measured of `x`.

    The first bank's kernel copies and measures all of `x`; the others work in place.
    """
    y, watched = _rows(x), None
    for index in served:
        arrays, options = _call(wiring, index, banks[index])
        if watched is None:
            y, watched = kernels.forward(y, *arrays, **options)
        else:
            y, _ = kernels.forward_in_place(y, *arrays, **options)
    return y.reshape(x.shape), watched


def backward(
    wiring: Wiring, banks: Banks, served: list[int], x: Array, watched: Array, dy: Array
) -> tuple[Array, Float32[Array, "C 5"], tuple[Params, ...]]:
    """`d x`, the channels that need a gradient, and the gradients of all banks' adapters."""
    d_adapters = [jax.tree.map(jnp.zeros_like, bank.adapters) for bank in banks]
    first, *others = served

    def fill(index: int, d_adapter: Adapter) -> None:
        d_adapters[index] = {name: getattr(d_adapter, name) for name in d_adapters[index]}

    arrays, options = _call(wiring, first, banks[first])
    d_x, d_adapter, channels = kernels.backward(_rows(x), _rows(dy), *arrays, watched, **options)
    fill(first, d_adapter)
    for index in others:
        arrays, options = _call(wiring, index, banks[index])
        d_x, d_adapter, more = kernels.backward_in_place(_rows(x), d_x, *arrays, watched, **options)
        fill(index, d_adapter)
        channels = channels.at[:, 1:].add(more[:, 1:])
    return d_x.reshape(dy.shape), channels, tuple(d_adapters)
