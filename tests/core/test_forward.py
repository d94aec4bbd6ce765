"""`y = x + act * adapter(x)`, against the same in float64."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from support import QUICK, adapter_of, blank, place, same_bits

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn._sites import Site
from esper_fn.errors import LayoutError
from esper_fn.lifecycle import Stage

DENSE = {
    "noop": ef.blueprints.noop(),
    "scale_shift": ef.blueprints.scale_shift(),
    "low_rank": ef.blueprints.low_rank(3),
    "relu": ef.blueprints.bottleneck(4),
    "gelu": ef.blueprints.bottleneck(4, activation="gelu"),
    "silu": ef.blueprints.bottleneck(4, activation="silu"),
    "gated": ef.blueprints.gated(4),
    "normalised": ef.blueprints.normalised(4),
}
ALL, FEW = tuple(DENSE), ("low_rank", "normalised")
SITES = (
    ef.site("even", features=45, chunks=9),
    ef.site("uneven", features=48, chunks=9),
    ef.site("span", source_features=48, features=31, chunks=9),
)


class Case(NamedTuple):
    growth: ef.Growth
    state: ef.GrowthState
    run: Any
    """`(state, xs) -> ys`, compiled."""
    gains: dict[int, float]


@cache
def case(at_once: int | None = None, names: tuple[str, ...] = FEW) -> Case:
    """The blueprints at every kind of site, each seed acting with another alpha."""
    blueprints = {name: DENSE[name] for name in names}
    layout = make_layout(sites=SITES, blueprints=blueprints, capacity=8 // len(names) + 1)
    growth = ef.Growth(**layout.arguments, adapters_at_once=at_once)
    rows = {}
    for seed in range(layout.num_seeds):
        site, _, chunk = layout.locate(seed)
        served = [n for n, b in blueprints.items() if b.can_span or not site.is_span]
        if chunk < 8:  # the last chunk stays dormant
            rows[seed] = (served[chunk % len(served)], Stage.GRAFTING, 0.3 + 0.08 * chunk)
    state = place(growth, blank(growth), rows)

    @partial(jax.jit, compiler_options=QUICK)
    def run(state: Any, xs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        seeds = growth.seeds(state)
        return {
            site.name: seeds.grow(
                site.name,
                xs[site.name],
                **({"source": xs[site.name + "/source"]} if site.is_span else {}),
            )
            for site in SITES
        }

    return Case(growth, state, run, {seed: row[2] for seed, row in rows.items()})


def inputs(shape: tuple[int, ...], dtype: Any) -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    xs = {}
    for site in SITES:
        xs[site.name] = jnp.asarray(rng.standard_normal((*shape, site.features)), dtype)
        if site.is_span:
            source = rng.standard_normal((*shape, site.source.features))
            xs[site.name + "/source"] = jnp.asarray(source, dtype)
    return xs


def chunk_of(chunking: Any, chunk: int) -> slice:
    start = int(chunking.starts[chunk])
    return slice(start, start + int(chunking.sizes[chunk]))


def expected(setup: Case, site: Site, xs: Any, dtype: Any) -> np.ndarray:
    """The formula, chunk by chunk, in one dtype of NumPy's."""
    layout = setup.growth.layout
    x = np.asarray(xs[site.name]).astype(dtype)
    u = np.asarray(xs[site.name + "/source"]).astype(dtype) if site.is_span else x
    parts = []
    for chunk in range(site.chunks):
        seed = layout.seed_index(site.name, chunk)
        part = x[..., chunk_of(site.target, chunk)]
        if seed in setup.gains:
            read = u[..., chunk_of(site.source, chunk)]
            name = layout.names[int(setup.state.seeds.blueprint[seed])]
            params = plain.cut(
                adapter_of(setup.growth, setup.state, seed), read.shape[-1], part.shape[-1]
            )
            params = {k: v.astype(dtype) for k, v in params.items()}
            r = plain.DENSE[name](params, read)
            assert r.dtype == dtype
            part = part + np.asarray(setup.gains[seed], dtype) * r
        parts.append(part)
    return np.concatenate(parts, axis=-1)


@pytest.mark.parametrize(
    ("shape", "at_once", "names"),
    [
        ((64,), None, ALL),
        ((), None, FEW),
        ((2, 3), 1, FEW),
        ((2, 3, 2), 1, FEW),
        ((5,), 1, FEW),
        ((64,), 1, ALL),
        ((5,), 3, FEW),
    ],
)
def test_float32_is_the_formula(
    shape: tuple[int, ...], at_once: int | None, names: tuple[str, ...]
) -> None:
    setup = case(at_once, names)
    xs = inputs(shape, jnp.float32)
    ys = setup.run(setup.state, xs)
    for site in SITES:
        want = expected(setup, site, xs, np.float64)
        assert ys[site.name].shape == want.shape
        np.testing.assert_allclose(ys[site.name], want, rtol=2e-6, atol=5e-6)
        # The dormant chunk is the same numbers, to the bit.
        last = chunk_of(site.target, site.chunks - 1)
        assert same_bits(ys[site.name][..., last], xs[site.name][..., last])


def test_bfloat16_is_no_worse_than_twice_a_plain_implementation() -> None:
    setup = case(names=ALL)
    setup = setup._replace(
        state=setup.state._replace(
            adapters=jax.tree.map(
                lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), setup.state.adapters
            )
        )
    )
    xs = inputs((64,), jnp.bfloat16)
    ys = setup.run(setup.state, xs)
    for site in SITES:
        want = expected(setup, site, xs, np.float64)
        rough = expected(setup, site, xs, jnp.dtype(jnp.bfloat16))
        assert ys[site.name].dtype == jnp.bfloat16

        def error(y: Any, want: np.ndarray = want) -> np.ndarray:
            return np.abs(np.asarray(y, np.float64) - want)

        ours, theirs = error(ys[site.name]), error(rough)
        for chunk in range(8):
            own = chunk_of(site.target, chunk)
            assert ours[:, own].mean() <= 2 * theirs[:, own].mean() + 1e-9
            assert ours[:, own].max() <= 2 * theirs[:, own].max() + 1e-9


def _odd_numbers(dtype: Any) -> jax.Array:
    """Whatever a float can be, in every chunk."""
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    odd = [jnp.nan, -jnp.nan, jnp.inf, -jnp.inf, -0.0, 0.0, tiny, -tiny, 3 * tiny]
    largest = float(jnp.finfo(dtype).max)
    return jnp.asarray(np.resize([*odd, largest, -largest, 1.0, -1e-3], (48,)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_act_0_is_the_identity_of_bits(at_once: int | None, dtype: str) -> None:
    setup = case(at_once)
    stages = {
        Stage.TRAINING: 0.0,
        Stage.GERMINATED: 0.0,
        Stage.GRAFTING: 0.0,  # alpha 0: as at the first step of a graft
        Stage.FINE_TUNING: 0.0,
    }
    num_seeds = setup.growth.layout.num_seeds
    stage = jnp.asarray(np.resize(list(stages), (num_seeds,)), jnp.int8)
    state = setup.state._replace(
        seeds=setup.state.seeds._replace(stage=stage, alpha=jnp.zeros((num_seeds,), jnp.float32))
    )
    odd = _odd_numbers(dtype)
    xs = {name: odd[: x.shape[-1]] for name, x in inputs((), dtype).items()}
    ys = setup.run(state, xs)
    for site in SITES:
        assert same_bits(ys[site.name], xs[site.name])


def test_an_adapter_reads_and_writes_its_own_chunk_alone() -> None:
    setup = case(3)
    xs = inputs((5,), jnp.float32)
    before = setup.run(setup.state, xs)
    seed = setup.growth.layout.seed_index("uneven", 4)
    x = xs["uneven"]
    chunk = chunk_of(SITES[1].target, 4)
    other = x.at[:, chunk].add(1.0)
    after = setup.run(setup.state, {**xs, "uneven": other})["uneven"]
    differs = np.any(np.asarray(after) != np.asarray(before["uneven"]), axis=0)
    assert not differs[: chunk.start].any()
    assert not differs[chunk.stop :].any()
    assert differs[chunk].all()
    assert setup.gains[seed] > 0


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_an_empty_batch_is_no_measurement(at_once: int | None) -> None:
    growth = ef.Growth(
        sites=[ef.site("hidden", features=7, chunks=3)],
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=3,
        adapters_at_once=at_once,
    )
    state = place(growth, blank(growth), {1: ("low_rank", Stage.TRAINING, 0.0)})

    def loss(_: Any, seeds: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(seeds.grow("hidden", x))

    value, (_, adapters), statistics = growth.value_and_grad(loss)((), state, jnp.zeros((0, 7)))
    assert float(value) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((adapters, statistics)))
    after, info = growth.survey(loss)((), state, jnp.zeros((0, 7)))
    assert not np.any(after.seeds.num_potentials)
    assert float(info.loss) == 0


def test_a_blueprint_that_returns_another_dtype_is_named() -> None:
    good = ef.blueprints.low_rank(2)

    def apply(params: Any, x: jax.Array, spec: Any, mask: jax.Array) -> jax.Array:
        return good.apply(params, x, spec, mask).astype(jnp.float32)

    growth = ef.Growth(
        sites=[ef.site("hidden", features=4)],
        blueprints={"mine": good._replace(name="mine", apply=apply, activation=None)},
        capacity=1,
    )
    seeds = growth.seeds(blank(growth))
    with pytest.raises(LayoutError, match=r"'mine': apply must return \(2, 4\) bfloat16.*float32"):
        seeds.grow("hidden", jnp.ones((2, 4), jnp.bfloat16))
