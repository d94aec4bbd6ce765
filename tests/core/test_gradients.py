"""The gains in the backward pass, and what the backward pass measures."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from support import QUICK, adapter_of, blank, place, same_bits

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.lifecycle import NUM_STAGES, Stage
from esper_fn.lifecycle._state import gains
from esper_fn.types import Seeds, Site
from esper_kernels import Statistics

ALPHA = 0.6
ROWS = 6
INPUTS, OUTPUTS = 24, 23  # features: 11 chunks, the first ones one wider
SITES = (
    ef.site("here", features=INPUTS, chunks=NUM_STAGES),
    ef.site("across", source_features=INPUTS, features=OUTPUTS, chunks=NUM_STAGES),
)
LAYOUT = make_layout(
    sites=SITES,
    blueprints={"silu": ef.blueprints.bottleneck(4, activation="silu")},
    capacity=NUM_STAGES,
)


class Ran(NamedTuple):
    """One backward pass with a seed in every stage at both sites."""

    growth: ef.Growth
    state: ef.GrowthState
    x: np.ndarray
    v: np.ndarray
    dy: dict[str, np.ndarray]
    value: Any
    d_inputs: Any
    d_adapters: Any
    statistics: Statistics


def batch() -> Any:
    """The two sites' inputs, and the weights that make `dy` whatever the test wants."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((ROWS, width)), jnp.float32)
        for width in (INPUTS, OUTPUTS, INPUTS, OUTPUTS)
    ]


def loss_fn(inputs: Any, seeds: Seeds, weights: Any) -> jax.Array:
    x, v = inputs
    y = seeds.grow("here", x)
    z = seeds.grow("across", v, source=x)
    return jnp.sum(y * weights[0]) + jnp.sum(z * weights[1])


@cache
def compiled(at_once: int | None) -> Any:
    growth = ef.Growth(**LAYOUT.arguments, adapters_at_once=at_once)
    return growth, jax.jit(growth.value_and_grad(loss_fn), compiler_options=QUICK)


@cache
def ran(at_once: int | None = None, alpha: float = ALPHA) -> Ran:
    growth, run = compiled(at_once)
    rows = {
        seed: ("silu", seed % NUM_STAGES, alpha if 3 <= seed % NUM_STAGES <= 7 else 0.0)
        for seed in range(LAYOUT.num_seeds)
    }
    state = place(growth, blank(growth), rows)
    x, v, wx, wv = batch()
    value, (d_inputs, d_adapters), statistics = run((x, v), state, (wx, wv))
    dy = {"here": np.asarray(wx), "across": np.asarray(wv)}
    return Ran(
        growth, state, np.asarray(x), np.asarray(v), dy, value, d_inputs, d_adapters, statistics
    )


def chunk_of(chunking: Any, chunk: int) -> slice:
    start = int(chunking.starts[chunk])
    return slice(start, start + int(chunking.sizes[chunk]))


def plain_adapter(params: Any, u: jax.Array) -> jax.Array:
    hidden = u @ params["down"] + jnp.broadcast_to(params["bias"], (u.shape[0], 4))
    return (hidden * jax.nn.sigmoid(hidden)) @ params["up"]


def by_hand(passes: Ran, site: Site, stage: int) -> Any:
    """`(d theta, d u)` of a seed's own adapter without gains, and its output."""
    seed = LAYOUT.seed_index(site.name, stage)
    read, written = chunk_of(site.source, stage), chunk_of(site.target, stage)
    whole = adapter_of(passes.growth, passes.state, seed)
    inputs, outputs = read.stop - read.start, written.stop - written.start
    params = {k: jnp.asarray(v) for k, v in plain.cut(whole, inputs, outputs).items()}
    r, pull = jax.vjp(plain_adapter, params, jnp.asarray(passes.x[:, read]))
    d_params, d_u = pull(jnp.asarray(passes.dy[site.name][:, written]))
    return d_params, np.asarray(d_u), np.asarray(r)


def gains_of(stage: int, alpha: float = ALPHA) -> list[float]:
    row = gains(jnp.int8(stage), jnp.float32(alpha if 3 <= stage <= 7 else 0.0))
    return [float(gain) for gain in row]


# Design section 4, by hand: act, learn, feel.
GAINS = {
    Stage.DORMANT: (0, 0, 0),
    Stage.GERMINATED: (0, 0, 0),
    Stage.TRAINING: (0, 1, 0),
    Stage.GRAFTING: (ALPHA, 1, ALPHA),
    Stage.STABILIZATION: (ALPHA, 1, ALPHA),
    Stage.EVALUATING: (ALPHA, 1, ALPHA),
    Stage.FINE_TUNING: (ALPHA, 1, ALPHA),
    Stage.FOSSILIZED: (ALPHA, 1, ALPHA),
    Stage.CULLED: (0, 0, 0),
    Stage.CANCELLED: (0, 0, 0),
    Stage.ROLLED_BACK: (0, 0, 0),
}


@pytest.mark.parametrize("stage", Stage)
def test_the_gains_of_a_stage(stage: Stage) -> None:
    np.testing.assert_allclose(gains_of(stage), GAINS[stage], rtol=1e-6)


@pytest.mark.parametrize("at_once", [None, 1, 3])
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
@pytest.mark.parametrize("stage", Stage)
def test_gradients_of_every_stage(stage: Stage, site: Site, at_once: int | None) -> None:
    passes = ran(at_once)
    _, learn, feel = GAINS[stage]
    read, written = chunk_of(site.source, stage), chunk_of(site.target, stage)
    d_params, d_u, r = by_hand(passes, site, stage) if 1 <= stage <= 7 else (None, 0.0, None)

    dy = passes.dy[site.name][:, written]
    if site.is_span:
        # What it writes to gets `dy`, to the bit; what it reads gets the site `here`'s share too.
        assert np.array_equal(passes.d_inputs[1][:, written], dy)
    else:
        across = SITES[1]
        through_span = by_hand(passes, across, stage)[1] * feel if feel else 0.0
        got = np.asarray(passes.d_inputs[0])[:, read]
        np.testing.assert_allclose(got, dy + feel * d_u + through_span, rtol=1e-5, atol=1e-5)
        if not feel:
            assert np.array_equal(got, dy)

    seed = LAYOUT.seed_index(site.name, stage)
    if d_params is not None:
        got = adapter_of(passes.growth, passes.state, seed, passes.d_adapters)
        got = plain.cut(got, read.stop - read.start, written.stop - written.start)
        for name, leaf in d_params.items():
            if learn:
                np.testing.assert_allclose(got[name], learn * leaf, rtol=1e-5, atol=1e-5)
                assert np.any(got[name] != 0)
            else:
                assert not np.any(got[name])
    is_live = learn or feel or GAINS[stage][0]
    assert float(passes.statistics.num_live[seed]) == (1.0 if is_live else 0.0)
    if is_live:
        np.testing.assert_allclose(passes.statistics.utility[seed], -np.sum(dy * r), rtol=1e-4)
        np.testing.assert_allclose(passes.statistics.output_square[seed], np.sum(r**2), rtol=1e-5)
    else:
        assert float(passes.statistics.utility[seed]) == 0.0


def test_free_slots_get_no_gradient() -> None:
    passes = ran()
    for site in SITES:
        owner = np.asarray(passes.state.owner)
        bank = next(b for b in LAYOUT.tables.banks if LAYOUT.sites[b.site].name == site.name)
        is_free = owner[bank.start : bank.start + bank.num_slots] < 0
        assert is_free.any()
        for leaf in jax.tree.leaves(passes.d_adapters[site.name]):
            assert not np.any(np.asarray(leaf)[is_free])


def test_statistics_are_the_hand_computed_sums() -> None:
    passes = ran()
    for site, x in zip(SITES, (passes.x, passes.v), strict=True):
        for chunk in range(site.chunks):
            seed = LAYOUT.seed_index(site.name, chunk)
            own, dy = x[:, chunk_of(site.target, chunk)], passes.dy[site.name]
            want = {
                "num_values": own.size,
                "total": own.sum(),
                "square": (own**2).sum(),
                "num_features": own.shape[1],
                "num_dead": 0,
                "gradient_square": (dy[:, chunk_of(site.target, chunk)] ** 2).sum(),
                "num_errors": 0,
            }
            for name, value in want.items():
                got = getattr(passes.statistics, name)[seed]
                np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_dead_features_are_counted() -> None:
    passes = ran()
    _, run = compiled(1)
    x, v, wx, wv = batch()
    first = chunk_of(SITES[0].target, 0)
    x = x.at[:, first.start].set(0.0).at[0, first.start + 1].set(0.0)
    _, _, statistics = run((x, v), passes.state, (wx, wv))
    assert statistics.num_dead.tolist() == [1.0] + [0.0] * (LAYOUT.num_seeds - 1)


def test_statistics_and_gradients_add_up_over_parts_of_a_batch() -> None:
    passes = ran()
    _, run = compiled(1)
    x, v, wx, wv = batch()
    parts = []
    for first in (0, ROWS // 2):
        rows = slice(first, first + ROWS // 2)
        # Of half the rows' shape, so that the loss stays a sum.
        parts.append(run((x[rows], v[rows]), passes.state, (wx[rows], wv[rows])))
    added = jax.tree.map(lambda a, b: np.asarray(a) + np.asarray(b), *[p[1][1] for p in parts])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        added,
        passes.d_adapters,
    )
    summed = Statistics(*(np.asarray(a) + np.asarray(b) for a, b in zip(*[p[2] for p in parts])))  # noqa: B905
    of_calls = {"num_features", "num_live"}  # counted once a call
    for name in Statistics._fields:
        whole = np.asarray(getattr(passes.statistics, name)) * (2 if name in of_calls else 1)
        np.testing.assert_allclose(getattr(summed, name), whole, rtol=1e-4, atol=1e-5)


def test_against_finite_differences_in_float64() -> None:
    """The true derivative, where a gain lets the whole of it through (FINE_TUNING)."""
    passes = ran()
    site, stage = SITES[0], Stage.FINE_TUNING
    own = chunk_of(site.target, stage)
    params = plain.cut(
        adapter_of(passes.growth, passes.state, LAYOUT.seed_index("here", stage)),
        own.stop - own.start,
        own.stop - own.start,
    )
    params = {k: v.astype(np.float64) for k, v in params.items()}
    x, dy = passes.x[:, own].astype(np.float64), passes.dy["here"][:, own].astype(np.float64)

    def loss(params: Any, x: np.ndarray) -> float:
        return float(np.sum((x + ALPHA * plain.DENSE["silu"](params, x)) * dy))

    def slope(array: np.ndarray) -> np.ndarray:
        slopes = np.zeros_like(array)
        for index in np.ndindex(*array.shape):
            old, step = array[index], 1e-6
            array[index] = old + step
            above = loss(params, x)
            array[index] = old - step
            slopes[index] = (above - loss(params, x)) / (2 * step)
            array[index] = old
        return slopes

    seed = LAYOUT.seed_index("here", stage)
    got = adapter_of(passes.growth, passes.state, seed, passes.d_adapters)
    got = plain.cut(got, own.stop - own.start, own.stop - own.start)
    for name, leaf in params.items():
        # A learning adapter gets the gradient of its full self: `learn` is 1 where `act` is alpha.
        np.testing.assert_allclose(ALPHA * got[name], slope(leaf), rtol=1e-4, atol=1e-5)
    through_span = by_hand(passes, SITES[1], stage)[1] * ALPHA
    d_x = np.asarray(passes.d_inputs[0])[:, own] - through_span
    np.testing.assert_allclose(d_x, slope(x), rtol=1e-4, atol=1e-4)


# --- who gets a gradient in which stage ------------------------------------------------------

CHAIN_SITES = ("below", "middle", "above")
CHAIN = make_layout(
    sites=[ef.site(name, features=8) for name in CHAIN_SITES],
    blueprints={"silu": ef.blueprints.bottleneck(4, activation="silu")},
    capacity=1,
)


def chain_host(params: Any, grow: Any, x: jax.Array) -> jax.Array:
    h = grow("below", jnp.tanh(x @ params["first"]))
    h = grow("middle", jnp.tanh(h @ params["upstream"]))
    h = grow("above", jnp.tanh(h @ params["downstream"]))
    return jnp.sum(jnp.square(h @ params["last"] - 0.3))


@cache
def chain() -> Any:
    growth = ef.Growth(**CHAIN.arguments, adapters_at_once=None)
    run = jax.jit(
        growth.value_and_grad(lambda p, seeds, x: chain_host(p, seeds.grow, x)),
        compiler_options=QUICK,
    )

    def reference(params: Any, adapters: Any, x: jax.Array, act: Any, learn: Any, feel: Any) -> Any:
        """Plain JAX with `stop_gradient`, for fossils below and above and one seed between."""

        def grow(name: str, h: jax.Array) -> jax.Array:
            adapter = adapters[name]["silu"]
            whole = {k: v[0] for k, v in adapter.items()}
            frozen = jax.lax.stop_gradient(whole)
            still = jax.lax.stop_gradient(h)
            # Learning adds `d theta = learn * J^T dy` and nothing to the value.
            taught = plain_adapter(whole, still)
            taught = taught - jax.lax.stop_gradient(taught)
            if name != "middle":
                return h + ALPHA * plain_adapter(frozen, h) + taught
            acting = act * plain_adapter(frozen, jnp.where(feel != 0, h, still))
            return h + acting + learn * taught

        return chain_host(params, grow, x)

    graded = jax.jit(jax.value_and_grad(reference, argnums=(0, 1)), compiler_options=QUICK)
    rng = np.random.default_rng(5)
    names = ("first", "upstream", "downstream", "last")
    params = {n: jnp.asarray(rng.standard_normal((8, 8)) * 0.4, jnp.float32) for n in names}
    x = jnp.asarray(rng.standard_normal((5, 8)), jnp.float32)
    return growth, blank(growth), run, graded, params, x


def at_stage(stage: Stage, alpha: float = ALPHA) -> Any:
    """`(value, (d host, d adapters))` of the chain with its middle seed in `stage`."""
    growth, state, run, _, params, x = chain()
    fossil = ("silu", Stage.FOSSILIZED, ALPHA)
    middle = ("silu", stage, alpha if 3 <= stage <= 7 else 0.0)
    state = place(growth, state, {0: fossil, 1: middle, 2: fossil})
    value, grads, _ = run(params, state, x)
    return state, value, grads


@pytest.mark.parametrize("stage", Stage)
def test_who_gets_a_gradient_in_which_stage(stage: Stage) -> None:
    state, value, (d_host, d_adapters) = at_stage(stage)
    _, _, _, graded, params, x = chain()
    act, learn, feel = (jnp.float32(gain) for gain in GAINS[stage])
    want, (want_host, want_adapters) = graded(params, state.adapters, x, act, learn, feel)

    np.testing.assert_allclose(value, want, rtol=1e-5)
    for name in params:  # the host, upstream and downstream, always learns, and exactly this
        np.testing.assert_allclose(d_host[name], want_host[name], rtol=1e-4, atol=1e-5)
        assert np.any(np.asarray(d_host[name]) != 0)
    learning = range(Stage.TRAINING, Stage.FOSSILIZED + 1)
    for name in CHAIN_SITES:  # fossils pass gradients on and learn themselves
        got = jax.tree.leaves(d_adapters[name])
        for leaf, other in zip(got, jax.tree.leaves(want_adapters[name]), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)
            assert np.any(leaf) == (name != "middle" or stage in learning)


def test_frozen_fossils_pass_gradients_on_and_take_none() -> None:
    _, _, run, _, params, x = chain()
    state, _, (d_host, d_adapters) = at_stage(Stage.FINE_TUNING)
    is_frozen = state.settings.is_frozen.at[Stage.FOSSILIZED].set(True)
    still = state._replace(settings=state.settings._replace(is_frozen=is_frozen))
    _, (frozen_host, frozen_adapters), _ = run(params, still, x)
    assert same_bits(frozen_host, d_host)
    assert same_bits(frozen_adapters["middle"], d_adapters["middle"])
    for name in ("below", "above"):
        assert all(np.any(leaf) for leaf in jax.tree.leaves(d_adapters[name]))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen_adapters[name]))


def test_the_matrix_of_design_section_4() -> None:
    """Against the dormant run: what a stage changes for the host above and below the seed."""
    _, _, (dormant, _) = at_stage(Stage.DORMANT)
    changed = {}
    for stage in Stage:
        _, _, (d_host, _) = at_stage(stage)
        changed[stage] = tuple(
            bool(np.any(np.asarray(d_host[name]) != np.asarray(dormant[name])))
            for name in ("first", "upstream", "downstream", "last")
        )
    acting = range(Stage.GRAFTING, Stage.FOSSILIZED + 1)
    assert changed == {stage: (stage in acting,) * 4 for stage in Stage}


def test_at_alpha_1_a_graft_gives_every_part_its_true_gradient() -> None:
    """At full strength nothing is cut: plain JAX's derivative of what is computed."""
    _, _, _, graded, params, x = chain()
    state, value, (d_host, d_adapters) = at_stage(Stage.GRAFTING, alpha=1.0)
    full = jnp.float32(1)
    want, (want_host, want_adapters) = graded(params, state.adapters, x, full, full, full)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, other in (
        *((d_host[name], want_host[name]) for name in params),
        *zip(
            jax.tree.leaves(d_adapters["middle"]),
            jax.tree.leaves(want_adapters["middle"]),
            strict=True,
        ),
    ):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5)
        assert np.any(np.asarray(got) != 0)
    # TRAINING, which must not be felt, cuts the adapter's Jacobian and never the host's own path.
    passes = ran()
    own = chunk_of(SITES[0].target, Stage.TRAINING)
    assert np.array_equal(passes.d_inputs[0][:, own], passes.dy["here"][:, own])
