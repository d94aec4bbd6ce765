"""Where the GPU kernels of `esper_kernels` compute a bank instead of a loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import esper_kernels.jax as kernels
from esper_fn._sites._chunks import adapter_of_chunk
from esper_fn._sites._schedule import Banks, BankView, SiteConfig
from esper_fn._typing import Array, Float32, Int32, Params
from esper_fn.errors import LayoutError
from esper_kernels import Adapter, BackwardStatistics


def divide(config: SiteConfig, banks: Banks, x: Array) -> tuple[list[int], list[int]]:
    """The banks that kernels compute here, and those that loops do.

    Raises:
      UnavailableError: a kernel is forced that cannot serve a bank of its form; says why.
    """
    every = list(range(len(banks)))
    if config.implementation == "loops" or config.site.is_span:
        return [], every
    if x.dtype == jnp.float16 or not x.size:
        return [], every
    if config.implementation == "auto" and config.adapters_at_once is None:
        return [], every
    served = [index for index in every if _is_served(config, index, banks[index], x)]
    return served, [index for index in every if index not in served]


def _is_served(config: SiteConfig, index: int, bank: BankView, x: Array) -> bool:
    blueprint = config.blueprints[index]
    if blueprint.activation is None:
        return False
    if not isinstance(bank.adapters, dict) or not set(bank.adapters) <= set(Adapter._fields):
        raise LayoutError(
            f"blueprint {blueprint.name!r} names an activation, so its parameters "
            f"must be a dict of some of {Adapter._fields}; see `esper_fn.blueprints.check`"
        )
    arrays, options = _call(config, index, bank)
    rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
    choice = kernels.explain(rows, *arrays, **options)
    return config.implementation != "auto" or choice.implementation != "reference"


def _call(
    config: SiteConfig, index: int, bank: BankView
) -> tuple[tuple[Adapter, Int32[Array, "C"], Float32[Array, "C 4"]], dict[str, Any]]:
    """A kernel's arguments that describe the adapters: matrices, each chunk's slot and gains."""
    slot = adapter_of_chunk(config.site.target, bank.chunk)
    gains = jnp.where((slot >= 0)[:, None], bank.gains[jnp.maximum(slot, 0)], 0.0)
    options = {
        "activation": config.blueprints[index].activation,
        "implementation": config.implementation,
    }
    return (Adapter(**bank.adapters), slot, gains), options


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def forward(
    config: SiteConfig, banks: Banks, served: list[int], x: Array
) -> tuple[Array, Float32[Array, "C 5"] | None]:
    """`x` with the served banks' adapters added, and the `ForwardStatistics` of `x`.

    The first bank's kernel copies and measures all of `x`; the others work in place.
    """
    y, statistics = _rows(x), None
    for index in served:
        arrays, options = _call(config, index, banks[index])
        if statistics is None:
            y, statistics = kernels.forward(y, *arrays, **options)
        else:
            y, _ = kernels.forward_in_place(y, *arrays, **options)
    return y.reshape(x.shape), statistics


def backward(
    config: SiteConfig, banks: Banks, served: list[int], x: Array, statistics: Array, dy: Array
) -> tuple[Array, Float32[Array, "C 5"], tuple[Params, ...]]:
    """`d x`, the `BackwardStatistics` as columns, and the gradients of all banks' adapters.

    Args:
      config: of the site.
      banks: all banks of the site.
      served: those that kernels compute; the gradients of the others are 0.
      x: what the site read.
      statistics: what `forward` measured of it.
      dy: the gradient of what it wrote.
    """
    d_adapters = [jax.tree.map(jnp.zeros_like, bank.adapters) for bank in banks]
    first, *others = served

    def fill(index: int, d_adapter: Adapter) -> None:
        d_adapters[index] = {name: getattr(d_adapter, name) for name in d_adapters[index]}

    arrays, options = _call(config, first, banks[first])
    d_x, d_adapter, measured = kernels.backward(_rows(x), _rows(dy), *arrays, statistics, **options)
    fill(first, d_adapter)
    after_slope = BackwardStatistics._fields.index("gradient_square") + 1
    for index in others:
        arrays, options = _call(config, index, banks[index])
        d_x, d_adapter, more = kernels.backward_in_place(
            _rows(x), d_x, *arrays, statistics, **options
        )
        fill(index, d_adapter)
        measured = measured.at[:, after_slope:].add(more[:, after_slope:])
    return d_x.reshape(dy.shape), measured, tuple(d_adapters)
