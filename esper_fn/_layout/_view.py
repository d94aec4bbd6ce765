"""From the state's flat arrays to what a loss function is given, and back."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from esper_fn._layout._layout import Layout, bank_capacity, local_chunk
from esper_fn._sites import (
    BankView,
    Moments,
    Seeds,
    SeedsStructure,
    Site,
    SiteConfig,
    SiteView,
    Visits,
    zero_moments,
)
from esper_fn._typing import Adapters, Array, Float32, Implementation, Int32
from esper_fn.lifecycle import NONE, SeedState, Settings, Stage
from esper_fn.lifecycle._state import gains
from esper_kernels import NUM_STATISTICS, Gains, Statistics

Taps = tuple[Array, ...]
"""One `[C, K]` (or `[L, C, K]`) zero array a site."""

Probes = tuple[Moments, ...]


def zero_taps(layout: Layout) -> Taps:
    """The taps to differentiate with respect to; see `esper_fn._sites`."""
    return tuple(
        jnp.zeros((*_stack(site.layers), site.chunks, NUM_STATISTICS), jnp.float32)
        for site in layout.sites
    )


def zero_probes(layout: Layout) -> Probes:
    """The survey's taps."""
    return tuple(zero_moments(site.source, site.target, site.layers) for site in layout.sites)


def _stack(layers: int | None) -> tuple[int, ...]:
    return () if layers is None else (layers,)


@jax.jit
def slot_gains(
    seeds: SeedState, owner: Int32[Array, "Q"], settings: Settings
) -> Float32[Array, "Q 4"]:
    """The `Gains` of every slot as columns; zero for free slots.

    An adapter that learns without acting is damped by `|dy| / (trust |x|)` of its chunk, from the
    averages of the steps before. In its first step it needs none: `r` is 0 at birth.
    """
    seed = jnp.maximum(owner, 0)
    stage = seeds.stage[seed]
    output_scale, param_grad_scale, input_grad_scale = jnp.unstack(
        gains(stage, seeds.alpha[seed]), axis=-1
    )
    is_frozen = settings.is_frozen[stage.astype(jnp.int32)]
    size = seeds.telemetry.gradient_scale[seed]
    columns = Gains(
        output_scale=output_scale,
        param_grad_scale=jnp.where(is_frozen, 0.0, param_grad_scale),
        input_grad_scale=input_grad_scale,
        output_damping=jnp.where(stage == Stage.TRAINING, size / settings.trust, 0.0),
    )
    return jnp.where((owner != NONE)[:, None], jnp.stack(columns, axis=-1), 0.0)


def view(
    layout: Layout,
    owner: Int32[Array, "Q"],
    gains_of_slots: Float32[Array, "Q 4"],
    adapters: Adapters,
    taps: Taps,
    *,
    at_once: int | None = None,
    implementation: Implementation = "auto",
    probes: Probes | None = None,
    visits: Visits | None = None,
    is_exact: bool = False,
) -> Seeds:
    """The `Seeds` for a loss function.

    Args:
      layout: the static layout.
      owner: who holds each slot.
      gains_of_slots: see `slot_gains`.
      adapters: parameters of all banks.
      taps: see `zero_taps`.
      at_once: adapters a site computes in one round over the live ones; None for every slot.
      implementation: see `esper_fn.Growth`.
      probes: see `zero_probes`; None outside a survey.
      visits: where to note the sites that are reached, if anywhere.
      is_exact: whether derivatives are those of the forward pass; the taps then measure nothing.
    """
    chunk = jnp.where(jnp.any(gains_of_slots != 0, axis=-1), local_chunk(layout, owner), -1)
    views, configs = [], []
    for index, site in enumerate(layout.sites):
        banks = [bank for bank in layout.tables.banks if bank.site == index]
        size = bank_capacity(site, layout.capacity)
        bank_views = []
        for bank in banks:
            slots = slice(bank.start, bank.start + bank.num_slots)
            stacked = BankView(
                adapters=adapters[site.name][layout.names[bank.blueprint]],
                chunk=chunk[slots],
                gains=gains_of_slots[slots],
            )
            bank_views.append(_by_layer(stacked, site))
        probe = None if probes is None else probes[index]
        views.append(SiteView(banks=tuple(bank_views), tap=taps[index], probe=probe))
        configs.append(
            SiteConfig(
                site=site,
                blueprints=tuple(layout.blueprints[bank.blueprint] for bank in banks),
                adapters_at_once=None if at_once is None else min(at_once, size),
                implementation=implementation,
                is_stacked=site.layers is not None,
                is_exact=is_exact,
            )
        )
    return Seeds(SeedsStructure(tuple(configs), visits), tuple(views))


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="is_exact")
def evaluation_seeds(
    layout: Layout,
    at_once: int | None,
    implementation: Implementation,
    seeds: SeedState,
    owner: Int32[Array, "Q"],
    settings: Settings,
    adapters: Adapters,
    *,
    is_exact: bool = False,
) -> Seeds:
    """The `Seeds` for a forward pass, by one program.

    Args:
      layout: the static layout.
      at_once: see `view`.
      implementation: see `view`.
      seeds: rows of all seeds.
      owner: who holds each slot.
      settings: the lifecycle's settings.
      adapters: parameters of all banks.
      is_exact: see `view`.
    """
    gains_of_slots = slot_gains(seeds, owner, settings)
    taps = zero_taps(layout)
    return view(
        layout,
        owner,
        gains_of_slots,
        adapters,
        taps,
        at_once=at_once,
        implementation=implementation,
        is_exact=is_exact,
    )


def _by_layer(bank: BankView, site: Site) -> BankView:
    """A bank with a leading axis of layers where the site has layers."""
    if site.layers is None:
        return bank

    def split(leaf: Array) -> Array:
        return leaf.reshape(site.num_layers, leaf.shape[0] // site.num_layers, *leaf.shape[1:])

    split_bank: BankView = jax.tree.map(split, bank)
    return split_bank


def statistics_of(taps: Taps) -> Statistics:
    """The taps' cotangents as one `Statistics` over the flat seed axis S."""
    return Statistics.from_columns(
        jnp.concatenate([tap.reshape(-1, NUM_STATISTICS) for tap in taps])
    )
