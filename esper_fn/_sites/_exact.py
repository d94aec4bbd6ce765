"""What a site computes, in plain JAX, so that every derivative is that of the function itself.

The rule of `_autodiff` is made for training: some of its gains differ from the forward pass, it
measures, and its loops have no forward mode. Here is the same function without that rule::

    y = x + output_scale * r

A loop of unknown length cannot be differentiated backwards, so all slots compute at once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from esper_fn._sites._chunks import add, read
from esper_fn._sites._passes import mask_rows, outputs
from esper_fn._sites._schedule import Banks, BankView, SiteConfig
from esper_fn._typing import Array, Float
from esper_fn.blueprints._base import Blueprint
from esper_kernels import Gains


def grow_exact(
    config: SiteConfig,
    banks: Banks,
    source: Float[Array, "... E"] | None,
    x: Float[Array, "... D"],
) -> Float[Array, "... D"]:
    """The activation with a site's adapters added, differentiable in both modes, to any order.

    Args:
      config: of the site.
      banks: of the site.
      source: what the adapters of a span read; None where they read `x`.
      x: what they write to.

    Returns:
      An activation like `x`.
    """
    y = x
    for blueprint, bank in zip(config.blueprints, banks, strict=True):
        y = _add_bank(config, blueprint, bank, x if source is None else source, y)
    return y


def _add_bank(
    config: SiteConfig, blueprint: Blueprint, bank: BankView, source: Array, y: Array
) -> Array:
    """`y` with the outputs of all acting adapters of one bank.

    An adapter that does not act, or whose output is not finite, counts as constant: its operands
    are replaced by zeros before, as selecting its output alone would leave `0 * inf` in reverse.
    """
    site, chunk = config.site, bank.chunk
    scale = Gains.from_columns(bank.gains).output_scale
    run = partial(outputs, config, blueprint, chunk)

    is_acting = (chunk >= 0) & (scale != 0)
    operands = bank.adapters, read(source, site.source, chunk)
    operands = jax.tree.map(partial(mask_rows, is_acting), operands)
    # Entries that are finite reach the host even if others are not, as in `rule_jax.blend`.
    constant = run(*jax.lax.stop_gradient(operands))
    is_sound = is_acting & jnp.all(jnp.isfinite(constant), axis=tuple(range(1, constant.ndim)))
    r = run(*jax.tree.map(partial(mask_rows, is_sound), operands))
    sound = is_sound.reshape(-1, *(1,) * (r.ndim - 1))
    return add(y, site.target, chunk, scale, jnp.where(sound, r, constant))
