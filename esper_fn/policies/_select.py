"""Which seeds a rule asks for."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_counts
from esper_fn._control import cond
from esper_fn._layout import Layout
from esper_fn._typing import Array, Bool, Float32, Int8, Int32, Key
from esper_fn.lifecycle import NONE, Stage
from esper_fn.lifecycle._commands import Kind, Requests
from esper_fn.policies._base import Observation, request

Score: TypeAlias = Literal["potential", "gradient", "random", "even"]
_SCORES = ("potential", "gradient", "random", "even")


def blueprint_by_group(layout: Layout, blueprint: str | None) -> np.ndarray:
    """The blueprint to grow at each layer of a site, NONE where the named one does not serve it.

    Args:
      layout: of the growth.
      blueprint: a name, or None for the first that serves the site.

    Returns:
      int8[G], indices of blueprints.

    Raises:
      UnknownNameError: the layout offers no blueprint of that name.
    """
    served = layout.tables.pool_start >= 0
    choice = served.argmax(axis=1)
    if blueprint is not None:
        index = layout.blueprint_index(blueprint)
        choice = np.where(served[:, index], index, NONE)
    return np.asarray(choice, np.int8)


def seed_blueprints(layout: Layout, blueprint: str | None = None) -> Int8[Array, "S"]:
    """What each seed may grow.

    Args:
      layout: of the growth.
      blueprint: a name, or None for the first blueprint that serves the seed's site.

    Returns:
      Index of the blueprint for each seed, `NONE` where the named one does not serve its site.

    Raises:
      UnknownNameError: the layout offers no blueprint of that name.
    """
    return jnp.asarray(blueprint_by_group(layout, blueprint)[_groups_of_seeds(layout)])


def _groups_of_seeds(layout: Layout) -> np.ndarray:
    """int32[S]: the layer of a site that each seed belongs to."""
    sizes = layout.tables.group_size
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def _choose(
    layout: Layout, observation: Observation, blueprint: str | None
) -> tuple[Int8[Array, "G"], Bool[Array, "G"] | None]:
    """What to grow at each layer of a site, and whether the limits behind the rule admit it.

    Where a rule leaves the blueprint open, it is the first one that is admitted.
    """
    choice = jnp.asarray(blueprint_by_group(layout, blueprint))
    if observation.is_admitted is None:
        return choice, None
    if blueprint is None:
        options = jnp.asarray(layout.tables.pool_start >= 0) & observation.is_admitted
        first = jnp.argmax(options, axis=1).astype(jnp.int8)
        choice = jnp.where(jnp.any(options, axis=1), first, choice)
    group = jnp.arange(choice.size)
    return choice, observation.is_admitted[group, jnp.maximum(choice, 0)]


def _room(layout: Layout, owner: Array, choice: Int8[Array, "G"]) -> Int32[Array, "G"]:
    """Free slots for the chosen blueprint of each group."""
    tables = layout.tables
    num_groups = len(tables.group_site)
    is_choice = jnp.asarray(tables.slot_blueprint, jnp.int8) == choice[tables.slot_group]
    is_free = (owner == NONE) & is_choice
    return (
        jnp.zeros((num_groups,), jnp.int32)
        .at[jnp.asarray(tables.slot_group)]
        .add(is_free.astype(jnp.int32))
    )


_MAX_PAIRWISE_SEEDS = 512
"""Up to here every pair of seeds is compared, which compiles in a third of the time of sorting."""


def _is_among_best(
    layout: Layout, worth: Float32[Array, "S"], room: Int32[Array, "G"], count: int
) -> Bool[Array, "S"]:
    """The `count` seeds of largest worth, of each group no more than there is room for.

    Of equal seeds the first one is better; seeds whose worth is minus infinity never are.
    """
    group = _groups_of_seeds(layout)
    if len(group) > _MAX_PAIRWISE_SEEDS:
        return _is_among_best_sorted(group, worth, room, count)
    index = np.arange(len(group))
    is_better = (worth[None, :] > worth[:, None]) | (
        (worth[None, :] == worth[:, None]) & jnp.asarray(index[None, :] < index[:, None])
    )
    is_alike = jnp.asarray(group[None, :] == group[:, None])
    fits = jnp.sum(is_better & is_alike, axis=1, dtype=jnp.int32) < room[jnp.asarray(group)]
    if count < len(group):
        fits &= jnp.sum(is_better, axis=1, dtype=jnp.int32) < count
    return fits & (worth > -jnp.inf)


def _is_among_best_sorted(
    group: np.ndarray, worth: Float32[Array, "S"], room: Int32[Array, "G"], count: int
) -> Bool[Array, "S"]:
    best, index = jax.lax.top_k(worth, min(count, len(group)))
    group_of_best = jnp.asarray(group)[index]
    fits = (best > -jnp.inf) & (_rank_in_group(group_of_best) < room[group_of_best])
    row = jnp.where(fits, index, len(group))
    return jnp.zeros(worth.shape, bool).at[row].set(True, mode="drop")


def _rank_in_group(group: Int32[Array, "n"]) -> Int32[Array, "n"]:
    """How many earlier entries are of the same group."""
    order = jnp.argsort(group, stable=True)
    ordered = group[order]
    rank = jnp.arange(group.size) - jnp.searchsorted(ordered, ordered, side="left")
    return jnp.zeros_like(group).at[order].set(rank.astype(group.dtype))


_AFTER_ALL_SPANS = 1e6


def _even_spread(layout: Layout) -> Float32[Array, "S"]:
    """A score by which the layers take turns, one seed each; seeds of spans come first.

    Sites whose names agree up to their last dot ("layer1.0", "layer1.1") are of one layer.
    """
    has_spans = any(site.is_span for site in layout.sites)
    turns: dict[tuple[str, int], int] = {}
    order = []
    for site in layout.sites:
        stem = site.name.rpartition(".")[0] or site.name
        is_late = has_spans and not site.is_span
        for layer in range(site.num_layers):
            first = turns.get((stem, layer), 0)
            turns[stem, layer] = first + site.chunks
            own = -np.arange(first, first + site.chunks, dtype=np.float32)
            order.append(own - _AFTER_ALL_SPANS * is_late)
    return jnp.asarray(np.concatenate(order), jnp.float32)


class _Best(NamedTuple):
    """Seeds to ask for."""

    is_requested: Bool[Array, "S"]
    blueprint: Int8[Array, "S"]
    worth: Float32[Array, "S"]


def request_best(
    is_due: Bool[Array, ""],
    layout: Layout,
    observation: Observation,
    requests: Requests,
    **arguments: Any,
) -> Requests:
    """Asks for the best dormant seeds, but of no pool for more than it has room for.

    If the limits behind the rule admit any of the adapters, it asks only for these. Otherwise it
    asks all the same, so that the log shows the limit's refusal.

    Args:
      is_due: whether to ask now; else nothing is computed.
      layout: of the growth.
      observation: of this step.
      requests: of the rules so far.
      **arguments: of `_best`.

    Returns:
      The requests with the new ones.
    """
    none = jnp.zeros((layout.num_seeds,), bool)
    best = cond(
        is_due,
        lambda: _best(layout, observation, requests.kind == Kind.NONE, **arguments),
        lambda: _Best(none, none.astype(jnp.int8), none.astype(jnp.float32)),
    )
    return request(requests, best.is_requested, best.blueprint, best.worth)


def _best(
    layout: Layout,
    observation: Observation,
    is_open: Bool[Array, "S"],
    *,
    score: Int32[Array, ""],
    blueprint: str | None,
    count: int,
    key: Key,
    floor: Array | float = -jnp.inf,
    is_barred: Bool[Array, "S"] | None = None,
) -> _Best:
    """The best seeds that can germinate.

    Args:
      layout: of the growth.
      observation: of this step.
      is_open: seeds of which nothing is asked yet.
      score: from `score_index`.
      blueprint: as in `periodic`.
      count: seeds to ask for at most.
      key: for random scores.
      floor: the least score to ask for.
      is_barred: seeds not to ask for.
    """
    choice, is_admitted = _choose(layout, observation, blueprint)
    room = _room(layout, observation.owner, choice)
    group = jnp.asarray(_groups_of_seeds(layout))
    seed_blueprint = choice[group]
    seeds = observation.seeds
    worth, is_measured = _scores(layout, observation, score, key)
    can = (
        (seeds.stage == Stage.DORMANT)
        & ~seeds.is_paused
        & is_measured
        & (worth >= floor)
        & (room > 0)[group]
        & (seed_blueprint != NONE)
        & is_open
        & (True if is_barred is None else ~is_barred)
    )
    if is_admitted is not None:
        fits_limits = can & is_admitted[group]
        can = jnp.where(jnp.any(fits_limits), fits_limits, can)
    is_requested = _is_among_best(layout, jnp.where(can, worth, -jnp.inf), room, count)
    return _Best(is_requested=is_requested, blueprint=seed_blueprint, worth=worth)


def _scores(
    layout: Layout, observation: Observation, score: Int32[Array, ""], key: Key
) -> tuple[Float32[Array, "S"], Bool[Array, "S"]]:
    """Each seed's score, and whether it is a measurement that promises something."""
    seeds = observation.seeds
    telemetry = seeds.telemetry

    def has_gain(score: Float32[Array, "S"]) -> Bool[Array, "S"]:
        # A chunk that is dead, or that no gradient reaches: an adapter there could never help.
        return jnp.isfinite(score) & (score != 0)

    worth, is_measured = jax.lax.switch(
        score,
        (
            lambda: (seeds.potential, (seeds.num_potentials > 0) & has_gain(seeds.potential)),
            lambda: (
                telemetry.gradient_norm,
                (telemetry.num_steps > 0) & has_gain(telemetry.gradient_norm),
            ),
            lambda: (
                jax.random.uniform(key, seeds.stage.shape, jnp.float32),
                jnp.ones(seeds.stage.shape, bool),
            ),
            lambda: (
                _even_spread(layout),
                jnp.ones(seeds.stage.shape, bool),
            ),
        ),
    )
    return worth, is_measured


def score_index(score: Score) -> Int32[Array, ""]:
    """The number by which a rule's state names a score, so that another one compiles nothing."""
    return jnp.int32(_SCORES.index(score))


def check_arguments(score: str, count: int, **steps: int) -> None:
    """Raises `ValueError` for an unknown score, or a count or a number of steps below 1."""
    if score not in _SCORES:
        raise ValueError(f"score must be one of {_SCORES}, got {score!r}")
    check_counts(count=count, **steps)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}")
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
