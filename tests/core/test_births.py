"""Adapters born where a survey says: the directions, whose they are, and what they are worth."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import silent
from support import QUICK, adapter_of, same_bits

import esper_fn as ef
from esper_fn import commands as cmd
from esper_fn._layout import make_layout
from esper_fn._sites import Moments
from esper_fn._survey import directions
from esper_fn.blueprints import AdapterSpec
from esper_fn.lifecycle import Stage
from esper_fn.types import Layout

RIDGE, DIRECTIONS = 1e-3, 4
NONE = -1


def _inverse_root(covariance: np.ndarray) -> np.ndarray:
    width = len(covariance)
    values, vectors = np.linalg.eigh(
        covariance + RIDGE * np.trace(covariance) / width * np.eye(width)
    )
    return vectors @ np.diag(values**-0.5) @ vectors.T


def _by_hand(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The columns that `directions` should find, from rows of input and gradient."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    rows = len(x)
    left = _inverse_root(x.T @ x / rows)
    white = left @ (x.T @ dy / rows)
    vectors, sizes, _ = np.linalg.svd(white, full_matrices=False)
    along = (left @ vectors)[:, :DIRECTIONS][:, sizes[:DIRECTIONS] > 1e-2 * sizes[0]]
    return along * np.sqrt(np.mean(x**2) / np.mean((x @ along) ** 2, axis=0))


def _moments(x: np.ndarray, dy: np.ndarray) -> Moments:
    return Moments(
        num_rows=jnp.asarray([len(x)], jnp.float32),
        x_dy=jnp.asarray(x.T @ dy, jnp.float32)[None],
        x_x=jnp.asarray(x.T @ x, jnp.float32)[None],
        dy_dy=jnp.asarray(dy.T @ dy, jnp.float32)[None],
    )


def _same_up_to_sign(found: Any, wanted: np.ndarray, tolerance: float = 5e-3) -> None:
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape
    signs = np.where(np.sum(found * wanted, axis=0) < 0, -1.0, 1.0)
    np.testing.assert_allclose(found * signs, wanted, atol=tolerance * np.abs(wanted).max())


# --- the directions ----------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(2, 2), (3, 9), (7, 6), (6, 12), (15, 3)])
def test_directions_are_singular_vectors(widths: Any) -> None:
    inputs, outputs = widths
    rng = np.random.default_rng(sum(widths))
    x = rng.standard_normal((400, inputs)) @ rng.standard_normal((inputs, inputs))
    strengths = np.linspace(2.0, 0.3, min(widths))
    mixed = np.linalg.qr(rng.standard_normal((inputs, inputs)))[0][:, : len(strengths)]
    spread = np.linalg.qr(rng.standard_normal((outputs, outputs)))[0][: len(strengths)]
    white = x @ _inverse_root(x.T @ x / len(x))
    dy = (white @ mixed * strengths) @ spread + rng.standard_normal((400, outputs))
    _same_up_to_sign(directions(_moments(x, dy))[0], _by_hand(x, dy))
    # Neither the units of the input nor the scale of the loss turn them.
    scaled = directions(_moments(100 * x, 1e-3 * dy))[0]
    _same_up_to_sign(scaled, _by_hand(x, dy))
    # The greatest gradient that uncorrelated units of that size can have; drawn ones have less.
    found = np.asarray(scaled, np.float64)
    most = np.linalg.norm((x @ found).T @ dy)
    for _ in range(20):
        other = x @ rng.standard_normal(found.shape)
        other = other @ _inverse_root(other.T @ other / len(x)) * np.sqrt(np.mean(x**2))
        assert np.linalg.norm(other.T @ dy) < most * 1.001


def test_a_planted_direction_is_found_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 12))
    planted = rng.standard_normal(12)
    planted /= np.linalg.norm(planted)
    dy = 0.5 * (x @ planted)[:, None] * rng.standard_normal(5) + rng.standard_normal((4000, 5))
    found = np.asarray(directions(_moments(x, dy))[0])
    assert found.shape == (12, 4)
    assert abs(found[:, 0] @ planted) / np.linalg.norm(found[:, 0]) > 0.99
    # A gradient of rank one names one direction; the rest would be rounding.
    exact = np.asarray(directions(_moments(x, (x @ planted)[:, None] * np.ones(5)))[0])
    assert np.count_nonzero(np.any(exact != 0, axis=0)) == 1
    assert abs(exact[:, 0] @ planted) / np.linalg.norm(exact[:, 0]) > 0.999


def test_directions_from_nothing_are_none_and_from_nan_show() -> None:
    x = np.random.default_rng(0).standard_normal((50, 5))
    for inputs, slopes in ((0 * x, x), (x, 0 * x), (0 * x, 0 * x)):
        assert not np.any(directions(_moments(inputs, slopes)))
    broken = x.copy()
    broken[3, 2] = np.nan
    assert not np.all(np.isfinite(directions(_moments(broken, x))))
    assert not np.all(np.isfinite(directions(_moments(x, broken))))


# --- the blueprints ----------------------------------------------------------------------------

ALONG = {
    "low_rank": ("down", ef.blueprints.low_rank(7), 1),
    "narrow": ("down", ef.blueprints.low_rank(2), 1),
    "bottleneck": ("down", ef.blueprints.bottleneck(9), 2),
    "paired": ("down", ef.blueprints.bottleneck(18, birth="paired"), 2),
    "gated": ("down", ef.blueprints.gated(5), 1),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALONG)
def test_the_first_matrix_holds_the_directions(name: str, dtype: str) -> None:
    matrix, blueprint, copies = ALONG[name]
    spec, key = AdapterSpec(6, 8, "vector"), jax.random.key(3)
    told = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)), jnp.float32)
    told = told.at[:, 1].set(0.0)  # no direction
    assert blueprint.init_along is not None
    ordinary = blueprint.init(key, spec, dtype)
    directed = blueprint.init_along(key, spec, dtype, told)
    first, drawn = directed[matrix], ordinary[matrix]
    is_own = np.zeros(first.shape[1], bool)
    for column in (0, 2):
        for sign, at in zip((1, -1), range(copies * column, copies * (column + 1)), strict=False):
            if at < first.shape[1]:
                is_own[at] = True
                assert same_bits(first[:, at], (sign * told[:, column]).astype(dtype))
    if name == "paired":
        assert same_bits(first[:, :9], first[:, 9:])
        is_own[9:] = is_own[:9]
    assert is_own.any()
    assert same_bits(first[:, ~is_own], drawn[:, ~is_own])
    rest = [{k: v for k, v in of.items() if k != matrix} for of in (directed, ordinary)]
    assert same_bits(*rest)
    assert same_bits(blueprint.init_along(key, spec, dtype, jnp.zeros((6, 4))), ordinary)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 6)), dtype)
    mask = jnp.ones((6,), bool)
    assert not np.any(jax.jit(lambda p, x: blueprint.apply(p, x, spec, mask))(directed, x))
    ef.blueprints.check(blueprint)


def test_check_holds_blueprints_to_the_contract_of_directions() -> None:
    good = ef.blueprints.low_rank(2)

    def also(key: Any, spec: AdapterSpec, dtype: Any, told: Any) -> Any:
        made = good.init_along(key, spec, dtype, told)  # type: ignore[misc]
        return {**made, "up": jnp.ones_like(made["up"])}

    def shifted(key: Any, spec: AdapterSpec, dtype: Any, told: Any) -> Any:
        return good.init(jax.random.fold_in(key, 1), spec, dtype)

    def wide(key: Any, spec: AdapterSpec, dtype: Any, told: Any) -> Any:
        return good.init(key, spec, jnp.float32)

    for init_along, words in (
        (also, "at birth along directions must be exactly zero"),
        (shifted, r"without a direction \(all zero\) must make exactly what init makes"),
        (wide, "parameters of the shapes and dtype that init makes"),
    ):
        with pytest.raises(ValueError, match=words):
            ef.blueprints.check(good._replace(init_along=init_along))


# --- what a survey remembers -------------------------------------------------------------------

SITES = (
    ef.site("hidden", features=11, chunks=2),
    ef.site("over", source_features=11, features=5),
    ef.site("deep", features=5, chunks=2, layers=2),
)
NAMES = {
    "linear": ef.blueprints.low_rank(6),
    "norm": ef.blueprints.normalised(3),
}
# Seeds: 0 and 1 of `hidden` (6 and 5 features), 2 `over`, 3 to 6 of `deep` (3 and 2 features).


@cache
def layout_of(dtype: str = "float32") -> Layout:
    return make_layout(sites=SITES, blueprints=NAMES, capacity=2, dtype=jnp.dtype(dtype))


def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    h = seeds.grow("hidden", jnp.tanh(x @ params["in"]))
    out = seeds.grow("over", h @ params["out"], source=h)

    def step(out: jax.Array, own: Any) -> Any:
        return own.grow("deep", jnp.tanh(out)), None

    out, _ = jax.lax.scan(step, out, seeds.layers("deep"))
    return jnp.mean(jnp.square(out - 0.4 - 0.3 * h[:, :5] * h[:, 5:10]))


@cache
def setting(directed: int = 2, dtype: str = "float32") -> Any:
    """growth, params, fresh state, x, survey and update, both compiled."""
    growth = ef.Growth(
        **layout_of(dtype).arguments,
        policy=ef.policies.never(),
        directed_births=directed,
        settings=ef.lifecycle.settings(embargo_steps=1),
    )
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.standard_normal((5, 11)) * 0.5, jnp.float32),
        "out": jnp.asarray(rng.standard_normal((11, 5)) * 0.4, jnp.float32),
    }
    x = jnp.asarray(rng.standard_normal((200, 5)), jnp.float32)
    survey = jax.jit(growth.survey(loss_fn), compiler_options=QUICK)
    update = jax.jit(growth.update, compiler_options=QUICK)

    def step(state: Any, *commands: Any) -> Any:
        return update(
            state, state.adapters, silent(7), jnp.float32(1.0), growth.commands(commands, 8)
        )

    return growth, params, growth.init(jax.random.key(5)), x, survey, step


def _remembered(state: Any) -> dict[int, np.ndarray]:
    """Seed -> directions."""
    told = {}
    for memory in state.directions:
        rows = np.asarray(memory.seed).reshape(-1), np.asarray(memory.along)
        flat = rows[1].reshape(-1, *rows[1].shape[2:])
        told |= {int(seed): along for seed, along in zip(rows[0], flat, strict=True) if seed >= 0}
    return told


def _rows_of_seeds(params: Any, x: jax.Array) -> list[tuple[np.ndarray, np.ndarray]]:
    """Input and gradient of every chunk, padded, from shifts put in by hand."""

    def shifted(shifts: Any) -> Any:
        h = jnp.tanh(x @ params["in"]) + shifts[0]
        read = [h, h]
        out = h @ params["out"] + shifts[1]
        for layer in range(2):
            out = jnp.tanh(out) + shifts[2 + layer]
            read.append(out)
        return jnp.mean(jnp.square(out - 0.4 - 0.3 * h[:, :5] * h[:, 5:10])), read

    shifts = [jnp.zeros((len(x), width)) for width in (11, 5, 5, 5)]
    slopes, read = jax.grad(shifted, has_aux=True)(shifts)
    at, dy = ([np.asarray(part) for part in parts] for parts in (read, slopes))

    def split(index: int, first: int) -> list[Any]:
        pairs = [(part[:, :first], part[:, first:]) for part in (at[index], dy[index])]
        wide, narrow = zip(*pairs, strict=True)
        return [wide, tuple(np.pad(part, ((0, 0), (0, 1))) for part in narrow)]

    return [*split(0, 6), (at[1], dy[1]), *split(2, 3), *split(3, 3)]


def test_memory_holds_each_seeds_own_directions() -> None:
    _, params, state, x, survey, _ = setting()
    assert [memory.along.shape for memory in state.directions] == [
        (1, 2, 6, 4),
        (1, 1, 11, 4),
        (2, 2, 3, 3),
    ]
    assert _remembered(state) == {}
    after, info = survey(params, state, x)
    told = _remembered(after)
    assert sorted(told) == list(range(7))
    for seed, (inputs, slopes) in enumerate(_rows_of_seeds(params, x)):
        wanted = _by_hand(inputs, slopes)
        # Neighbours of nearly equal singular values may mix: the leading one is told apart.
        _same_up_to_sign(told[seed][:, :1], wanted[:, :1], 3e-2)
        np.testing.assert_allclose(
            np.mean((inputs @ told[seed]) ** 2, axis=0)[0], np.mean(inputs**2), rtol=1e-2
        )
    # Uneven chunks: exactly nothing in the padding.
    for seed in (1, 4, 6):
        assert not np.any(told[seed][-1])
    # Only the best of each layer, where there is no room for more.
    small = setting(1)
    best, found = small[4](params, small[2], x)
    potential = np.asarray(found.potential)
    pools = [(0, 1), (2,), (3, 4), (5, 6)]
    want = [max(pool, key=lambda seed: potential[seed]) for pool in pools]
    assert sorted(_remembered(best)) == want
    for seed, along in _remembered(best).items():
        _same_up_to_sign(along[:, :1], told[seed][:, :1], 1e-3)
    # Two programs, which XLA may round differently.
    np.testing.assert_allclose(info.potential, found.potential, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_adapter_is_born_along_its_seeds_directions_and_no_other(dtype: str) -> None:
    growth, params, state, x, survey, step = setting(2, dtype)
    plain, _, bare, _, _, plain_step = setting(0, dtype)
    assert bare.directions is None
    surveyed, _ = survey(params, state, x)
    told = _remembered(surveyed)
    # The other order, so that slots and rows of the memory do not agree; seed 0 is forgotten, and
    # what stands in the memory for seed 3 is of no use to a blueprint without `init_along`.
    hidden, *others = surveyed.directions
    hidden = hidden._replace(seed=jnp.where(hidden.seed == 0, NONE, hidden.seed))
    surveyed = surveyed._replace(directions=(hidden, *others))
    first = [cmd.germinate(seed, "linear") for seed in (6, 1, 0)]
    later = [cmd.germinate(seed, "linear") for seed in (5, 2)] + [cmd.germinate(3, "norm")]
    born, info = step(step(surveyed, *first)[0], *later)
    other, nothing = step(step(state, *first)[0], *later)
    assert (int(info.num_directed), int(nothing.num_directed)) == (2, 0)
    without, _ = plain_step(plain_step(bare, *first)[0], *later)
    for seed in range(7):
        if seed == 4:
            assert born.seeds.stage[seed] == Stage.DORMANT
            continue
        adapter, ordinary = adapter_of(growth, born, seed), adapter_of(growth, other, seed)
        # Another program, whose random numbers may differ in the last place.
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        for one, two in zip(
            jax.tree.leaves(ordinary),
            jax.tree.leaves(adapter_of(plain, without, seed)),
            strict=True,
        ):
            np.testing.assert_allclose(np.float32(one), np.float32(two), rtol=tolerance)
        if seed in (0, 3):
            assert same_bits(adapter, ordinary)
            continue
        count = np.count_nonzero(np.any(told[seed] != 0, axis=0))
        told[seed] = told[seed][:, :count]
        assert count
        assert same_bits(adapter["down"][:, :count], jnp.asarray(told[seed]).astype(dtype))
        assert same_bits(adapter["down"][:, count:], ordinary["down"][:, count:])
        assert not np.any(adapter["up"])
        assert not same_bits(adapter["down"], ordinary["down"])
    # Each is spent; whoever was not born still has its own.
    assert sorted(_remembered(born)) == [4]
    # Slots in which nobody was born are untouched.
    for site in born.adapters:
        used = {int(born.seeds.slot[seed]) for seed in (0, 1, 2, 3, 5, 6)}
        for bank in growth.layout.tables.banks:
            if growth.layout.sites[bank.site].name != site:
                continue
            name = growth.layout.names[bank.blueprint]
            idle = np.array([bank.start + at not in used for at in range(bank.num_slots)])
            old, new = (jax.tree.leaves(of.adapters[site][name]) for of in (state, born))
            assert same_bits([leaf[idle] for leaf in old], [leaf[idle] for leaf in new])


def test_stale_memory_is_not_used() -> None:
    growth, params, state, x, survey, step = setting()
    surveyed, _ = survey(params, state, x)
    born, _ = step(surveyed, cmd.germinate(2, "linear"))
    assert not np.array_equal(born.directions[1].seed, surveyed.directions[1].seed)
    # A second life without a new survey begins as ever.
    gone, _ = step(born, cmd.cancel(2))
    while gone.seeds.stage[2] != Stage.DORMANT:
        gone, _ = step(gone)
    again, info = step(gone, cmd.germinate(2, "linear"))
    assert again.seeds.stage[2] == Stage.GERMINATED
    assert int(info.num_directed) == 0
    # A seed that lives is not surveyed for an adapter to come, and neither is one that is unknown.
    assert sorted(_remembered(survey(params, born, x)[0])) == [0, 1, 3, 4, 5, 6]
    lost, _ = survey(params, surveyed, x.at[0, 0].set(jnp.nan))
    assert _remembered(lost) == {}
    newborn, info = step(lost, cmd.germinate(2, "linear"))
    assert int(info.num_directed) == 0
    assert np.all(np.isfinite(adapter_of(growth, newborn, 2)["down"]))
    partly = jax.jit(
        growth.survey(lambda p, seeds, x: jnp.sum(seeds.grow("hidden", x @ p["in"]) ** 2)),
        compiler_options=QUICK,
    )
    assert sorted(_remembered(partly(params, surveyed, x)[0])) == [0, 1]
