"""The forward and the backward pass of one site: `esper_kernels.rule_jax` over its banks."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._sites import _kernels
from esper_fn._sites._chunks import add, read, split
from esper_fn._sites._schedule import (
    Banks,
    BankView,
    SiteConfig,
    add_rows,
    for_each_live,
    set_rows,
)
from esper_fn._typing import Array, Bool, Float, Float32, Int32, Params
from esper_fn.blueprints._base import Blueprint
from esper_fn.errors import LayoutError
from esper_kernels import NUM_BACKWARD_STATISTICS, Gains, rule_jax


class SiteGradients(NamedTuple):
    """What the backward pass of a site yields."""

    d_source: Array
    """Gradient of what the site reads; in place, `dy` and more."""
    statistics: Float32[Array, "C 5"]
    """The columns of `BackwardStatistics`."""
    d_adapters: tuple[Params, ...]
    """Of each bank."""


def outputs(
    config: SiteConfig,
    blueprint: Blueprint,
    chunk: Int32[Array, "n"],
    adapters: Params,
    u: Float[Array, "n ... F"],
) -> Float[Array, "n ... G"]:
    """The outputs of n adapters, zero in the padding of narrow chunks.

    Args:
      config: of the site.
      blueprint: of the adapters.
      chunk: the chunk of each adapter; negative for none.
      adapters: their parameters, `[n, ...]`.
      u: what each adapter reads.

    Raises:
      LayoutError: the blueprint's `apply` returns another shape or dtype than it must.
    """
    site, safe = config.site, jnp.maximum(chunk, 0)
    mask = jnp.asarray(site.source.mask)[safe]
    r = jax.vmap(lambda adapter, x, real: blueprint.apply(adapter, x, site.spec, real))(
        adapters, u, mask
    )
    expected = (*u.shape[:-1], site.spec.outputs)
    if r.shape != expected or r.dtype != u.dtype:
        raise LayoutError(
            f"blueprint {blueprint.name!r}: apply must return {expected[1:]} {u.dtype}, its "
            f"input's dtype whatever the parameters' is, got {r.shape[1:]} {r.dtype}"
        )
    if site.target.is_even:
        return r
    is_real = jnp.asarray(site.target.mask)[safe]
    return jnp.where(is_real.reshape(-1, *(1,) * (r.ndim - 2), r.shape[-1]), r, jnp.zeros_like(r))


def forward(
    config: SiteConfig, banks: Banks, source: Array, target: Array
) -> tuple[Array, Float32[Array, "C 5"] | None]:
    """`y`, and the `ForwardStatistics` where a kernel measured them on its way.

    Args:
      config: of the site.
      banks: of the site.
      source: `[..., E]`, what the adapters read.
      target: `[..., D]`, what they write to; `source` itself but over a span.
    """
    served, rest = _kernels.divide(config, banks, target)
    y, statistics = _kernels.forward(config, banks, served, target)

    def run(blueprint: Blueprint, slot: Array, rows: BankView, y: Array) -> Array:
        del slot
        u = read(source, config.site.source, rows.chunk)
        r = outputs(config, blueprint, rows.chunk, rows.adapters, u)
        scale = Gains.from_columns(rows.gains).output_scale
        return add(y, config.site.target, rows.chunk, scale, r)

    y = rule_jax.bits(y)
    for index in rest:
        run_bank = partial(run, config.blueprints[index])
        y = for_each_live(config.adapters_at_once, banks[index], run_bank, y)
    return y.view(target.dtype), statistics


def backward(
    config: SiteConfig, banks: Banks, source: Array, statistics: Array, dy: Array
) -> SiteGradients:
    """Gradients of the adapters and of what they read, and the statistics that need a gradient.

    Args:
      config: of the site.
      banks: of the site.
      source: `[..., E]`, what the adapters read.
      statistics: the `ForwardStatistics` of what they write to.
      dy: `[..., D]`, the gradient of what the site wrote.
    """
    served, rest = _kernels.divide(config, banks, dy)
    site, chunks = config.site, config.site.chunks
    gradients = SiteGradients(
        d_source=jnp.zeros_like(source) if site.is_span else dy,
        statistics=jnp.zeros_like(dy, shape=(chunks, NUM_BACKWARD_STATISTICS), dtype=jnp.float32),
        d_adapters=tuple(jax.tree.map(jnp.zeros_like, bank.adapters) for bank in banks),
    )
    if not dy.size:
        return gradients
    if served:
        gradients = SiteGradients(*_kernels.backward(config, banks, served, source, statistics, dy))
    squares = gradients.statistics[:, :1]

    gradients = gradients._replace(d_source=rule_jax.bits(gradients.d_source))
    for index in rest:
        run_bank = partial(_pull_rows, config, index, source, dy)
        gradients = for_each_live(config.adapters_at_once, banks[index], run_bank, gradients)
    d_source = gradients.d_source.view(source.dtype)
    if not served:
        # Where no adapter lives `d_source` still is `dy`, and measuring it here, after the loop,
        # leaves XLA free to work in the buffer of `dy` and to go on with the host meanwhile.
        slope = (dy if site.is_span else d_source).astype(jnp.float32)
        by_feature = jnp.sum(jnp.square(slope), axis=tuple(range(dy.ndim - 1)))
        squares = jnp.sum(split(by_feature, site.target), axis=-1, keepdims=True)
        is_live = gradients.statistics[:, 1:2] > 0
        squares = jnp.where(is_live, gradients.statistics[:, :1], squares)
    # A kernel measured all of `dy`, the loops once more what they serve.
    statistics = jnp.concatenate([squares, gradients.statistics[:, 1:]], axis=-1)
    return gradients._replace(d_source=d_source, statistics=statistics)


def _pull_rows(
    config: SiteConfig,
    index: int,
    source: Array,
    dy: Array,
    slot: Int32[Array, "n"],
    rows: BankView,
    gradients: SiteGradients,
) -> SiteGradients:
    """`gradients` after n slots of bank `index`."""
    site, chunk = config.site, rows.chunk
    u = read(source, site.source, chunk)
    # No other seed has written to the chunk, and so no copy of `dy` need be kept.
    slope = read(dy if site.is_span else gradients.d_source, site.target, chunk).view(dy.dtype)
    gains = Gains.from_columns(rows.gains)
    run = partial(outputs, config, config.blueprints[index], chunk)
    pulled = rule_jax.pullback(run, gains, rows.adapters, u, slope)
    measured = jnp.where((chunk >= 0)[:, None], jnp.stack(pulled.statistics, axis=-1), 0.0)
    if config.adapters_at_once is None:
        d_adapters = pulled.d_adapters
    else:
        old = gradients.d_adapters[index]
        d_adapters = jax.tree.map(partial(_set_rows, slot), old, pulled.d_adapters)
    scale, before, after = gains.input_grad_scale, index, index + 1
    return SiteGradients(
        d_source=add(gradients.d_source, site.source, chunk, scale, pulled.d_u),
        statistics=add_rows(
            gradients.statistics, jnp.where(chunk >= 0, chunk, site.chunks), measured
        ),
        d_adapters=(
            *gradients.d_adapters[:before],
            d_adapters,
            *gradients.d_adapters[after:],
        ),
    )


def _set_rows(slot: Int32[Array, "n"], leaf: Array, values: Array) -> Array:
    return set_rows(leaf, slot, values)


def backward_smooth(
    config: SiteConfig, banks: Banks, source: Array, dy: Array
) -> tuple[Array, tuple[Params, ...]]:
    """The gradients of `backward` from all slots at once, which can be differentiated again.

    Gains count as constant, and so does all of an adapter that does not work or breaks: what it
    reads is replaced by zeros before, as selecting afterwards would leave `0 * inf` behind.
    """
    d_source, all_adapters = jnp.zeros_like(source) if config.site.is_span else dy, []
    for blueprint, bank in zip(config.blueprints, banks, strict=True):
        run = partial(_pull_smooth, config, blueprint, source, dy)
        d_source, d_adapters = for_each_live(None, bank, run, d_source)
        all_adapters.append(d_adapters)
    return d_source, tuple(all_adapters)


def _pull_smooth(
    config: SiteConfig,
    blueprint: Blueprint,
    source: Array,
    dy: Array,
    slot: Int32[Array, "P"],
    rows: BankView,
    d_source: Array,
) -> tuple[Array, Params]:
    del slot
    site, chunk = config.site, rows.chunk
    gains = Gains.from_columns(jax.lax.stop_gradient(rows.gains))
    run = partial(outputs, config, blueprint, chunk)
    inputs = rows.adapters, read(source, site.source, chunk), read(dy, site.target, chunk)
    checked = rule_jax.pullback(run, gains, *jax.lax.stop_gradient(inputs))
    is_sound = checked.is_flowing & (chunk >= 0)
    inputs = jax.tree.map(partial(mask_rows, is_sound), inputs)
    pulled = rule_jax.pullback(run, gains, *inputs)
    scale = jnp.where(is_sound, gains.input_grad_scale, 0.0)
    return add(d_source, site.source, chunk, scale, pulled.d_u), pulled.d_adapters


def mask_rows(is_sound: Bool[Array, "n"], leaf: Array) -> Array:
    """`leaf`, `[n, ...]`, with zeros in the rows of adapters that are not sound."""
    return jnp.where(rule_jax.per_adapter(is_sound, leaf), leaf, 0)
