"""From the state's flat arrays to what a loss function is given, and back."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from esper_fn._lattice._forward import NUM_CHANNELS, Reading
from esper_fn._lattice._lattice import Lattice, bank_capacity, local_chunk
from esper_fn._lattice._probe import Moments, zero_moments
from esper_fn._lattice._rounds import BankView, Wiring
from esper_fn._lattice._seeds import Layout, Seeds, SiteView, Visits
from esper_fn._typing import Array, Bodies, Float32, Int32
from esper_fn.base import Implementation
from esper_fn.lifecycle import NONE, SeedState, Settings, Stage, gains

Taps = tuple[Array, ...]
"""One `[C, K]` (or `[L, C, K]`) zero array a site."""

Probes = tuple[Moments, ...]


def zero_taps(lattice: Lattice) -> Taps:
    """The taps to differentiate with respect to; see `_forward`."""
    return tuple(
        jnp.zeros((*_stack(place.layers), place.chunks, NUM_CHANNELS), jnp.float32)
        for place in lattice.sites
    )


def zero_probes(lattice: Lattice) -> Probes:
    """The survey's taps."""
    return tuple(
        jax.tree.map(
            lambda leaf, place=place: jnp.zeros((*_stack(place.layers), *leaf.shape), leaf.dtype),
            jax.eval_shape(lambda place=place: zero_moments(place.source, place.target)),
        )
        for place in lattice.sites
    )


def _stack(layers: int | None) -> tuple[int, ...]:
    return () if layers is None else (layers,)


def slot_gains(
    seeds: SeedState, owner: Int32[Array, "Q"], settings: Settings
) -> Float32[Array, "Q 4"]:
    """act, learn, feel and damping of every slot; zero for free ones.

    A body that learns without acting is damped by `|dy| / (trust |x|)` of its chunk, from the
    averages of the steps before. In its first step it needs none: `r` is 0 at birth.
    """
    seed = jnp.maximum(owner, 0)
    stage = seeds.stage[seed]
    act, learn, feel = jnp.unstack(gains(stage, seeds.alpha[seed]), axis=-1)
    learn = jnp.where(settings.is_frozen[stage.astype(jnp.int32)], 0.0, learn)
    scale = seeds.telemetry.gradient_scale[seed]
    damping = jnp.where(stage == Stage.TRAINING, scale / settings.trust, 0.0)
    of_slot = jnp.stack([act, learn, feel, damping], axis=-1)
    return jnp.where((owner != NONE)[:, None], of_slot, 0.0)


def view(
    lattice: Lattice,
    owner: Int32[Array, "Q"],
    gains_of_slots: Float32[Array, "Q 4"],
    bodies: Bodies,
    taps: Taps,
    *,
    at_once: int | None = None,
    implementation: Implementation = "auto",
    probes: Probes | None = None,
    visits: Visits | None = None,
) -> Seeds:
    """The `Seeds` for a loss function.

    Args:
      lattice: the static layout.
      owner: who holds each slot.
      gains_of_slots: see `slot_gains`.
      bodies: parameters of all banks.
      taps: see `zero_taps`.
      at_once: bodies a site computes in one round over the live ones; None for every slot.
      implementation: see `esper_fn.growth`.
      probes: see `zero_probes`; None outside a survey.
      visits: where to note the sites that are reached, if anywhere.
    """
    chunk = local_chunk(lattice, owner)
    views, wirings = [], []
    for index, place in enumerate(lattice.sites):
        banks = [bank for bank in lattice.tables.banks if bank.site == index]
        stack, size = _stack(place.layers), bank_capacity(place, lattice.capacity)
        bank_views = []
        for bank in banks:
            here = slice(bank.start, bank.start + bank.num_slots)
            stacked = BankView(
                bodies=bodies[place.name][lattice.names[bank.blueprint]],
                chunk=chunk[here],
                gains=gains_of_slots[here],
            )
            bank_views.append(
                jax.tree.map(
                    lambda leaf, stack=stack, place=place: leaf.reshape(
                        *stack, leaf.shape[0] // place.num_layers, *leaf.shape[1:]
                    ),
                    stacked,
                )
            )
        views.append(
            SiteView(
                banks=tuple(bank_views),
                tap=taps[index],
                probe=None if probes is None else probes[index],
            )
        )
        wirings.append(
            Wiring(
                source=place.source,
                target=place.target,
                is_span=place.is_span,
                spec=place.spec,
                blueprints=tuple(lattice.blueprints[bank.blueprint] for bank in banks),
                at_once=None if at_once is None else min(at_once, size),
                implementation=implementation,
            )
        )
    layout = Layout(
        sites=lattice.sites,
        wirings=tuple(wirings),
        is_stacked=tuple(place.layers is not None for place in lattice.sites),
        visits=visits,
    )
    return Seeds(layout, tuple(views))


def readings_of(taps: Taps) -> Reading:
    """The taps' cotangents as one `Reading` over the flat seed axis S."""
    flat = jnp.concatenate([tap.reshape(-1, NUM_CHANNELS) for tap in taps])
    return Reading(*(flat[:, channel] for channel in range(NUM_CHANNELS)))


def per_slot_tree(lattice: Lattice, values: Array) -> Mapping[str, Mapping[str, Array]]:
    """`[Q, ...]` in the shape of the bodies: site -> blueprint -> `[P, ...]`."""
    tree: dict[str, dict[str, Array]] = {place.name: {} for place in lattice.sites}
    for bank in lattice.tables.banks:
        site, name = lattice.sites[bank.site].name, lattice.names[bank.blueprint]
        tree[site][name] = values[bank.start : bank.start + bank.num_slots]
    return tree
