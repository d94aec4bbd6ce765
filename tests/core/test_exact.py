"""`growth.seeds(state, exact=True)`: derivatives of the function that is computed, in every mode.

They are compared with finite differences of a definition in float64, where these are accurate.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from exact_network import (
    FULL,
    PARAMS,
    Point,
    X,
    along_line,
    close,
    flat,
    jit,
    loss_fn,
    make_growth,
    make_loss,
    make_state,
    normal,
    setting,
)
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from support import blank, place, same_bits

import esper_fn as ef
from esper_fn.lifecycle import ACTS, Stage

NAN_PAYLOAD = np.array(0x7FC0BEEF, np.uint32).view(np.float32)


def is_zero(tree: Any) -> bool:
    return not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


def test_first_derivatives_are_finite_differences_in_both_modes() -> None:
    _, _, loss, point, directions = setting()
    of_row, row = flat(loss, point)
    slope = jit(jax.jacrev(of_row))(row)
    pushed = jit(jax.vmap(lambda t: jax.jvp(of_row, (row,), (t,))[1]))(jnp.float32(directions))
    step = 1e-5
    want = [(along_line(d, step) - along_line(d, -step)) / (2 * step) for d in directions]
    np.testing.assert_allclose(pushed, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(directions @ np.asarray(slope), want, rtol=1e-4, atol=1e-5)
    close(jit(jax.jacfwd(of_row))(row), slope)
    value, linear = jax.linearize(of_row, row)
    np.testing.assert_allclose(value, along_line(directions[0], 0.0), rtol=1e-5)
    close(jax.vmap(linear)(jnp.float32(directions)), pushed)


def test_second_derivatives_are_finite_differences() -> None:
    """Forward over reverse, of parameters, adapters and inputs together."""
    _, _, loss, point, directions = setting()
    of_row, row = flat(loss, point)

    def curvature(direction: jax.Array) -> jax.Array:
        return direction @ jax.jvp(jax.grad(of_row), (row,), (direction,))[1]

    got = jit(jax.vmap(curvature))(jnp.float32(directions))
    step = 1e-3
    middle = along_line(directions[0], 0.0)
    want = [(along_line(d, step) - 2 * middle + along_line(d, -step)) / step**2 for d in directions]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_hessians_agree_in_every_order_of_modes(outer: Any, inner: Any) -> None:
    _, _, loss, point, _ = setting()
    of_row, row = flat(lambda params: loss(point._replace(params=params)), point.params)
    hessian = np.asarray(jit(outer(inner(of_row)))(row))
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(hessian, _hessian(), rtol=1e-3, atol=1e-4)


@cache
def _hessian() -> np.ndarray:
    _, _, loss, point, _ = setting()
    of_row, row = flat(lambda params: loss(point._replace(params=params)), point.params)
    return np.asarray(jit(jax.hessian(of_row))(row))


def test_the_slope_in_alpha_is_the_true_one() -> None:
    growth, state, _, _, _ = setting()

    def loss(alpha: jax.Array) -> jax.Array:
        moved = state._replace(seeds=state.seeds._replace(alpha=alpha))
        return loss_fn(PARAMS, growth.seeds(moved, exact=True), X)

    alpha, step, seed = state.seeds.alpha, 1e-2, 4
    slope = jit(jax.grad(loss))(alpha)[seed]
    after, before = (jit(loss)(alpha.at[seed].add(sign * step)) for sign in (1, -1))
    np.testing.assert_allclose(slope, (after - before) / (2 * step), rtol=2e-3)


def test_the_usual_view_has_no_forward_mode() -> None:
    growth, state, _, point, _ = setting()
    usual = make_loss(growth, state, exact=False)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(usual, (point,), (point,))


# --- beside the usual view -----------------------------------------------------------------------


@jax.jit
def _grown(seeds: Any, x: jax.Array) -> jax.Array:
    return seeds.grow("hidden", x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("stage", list(Stage))
def test_the_forward_pass_is_the_usual_one(stage: Stage, dtype: Any) -> None:
    """Bit for bit where no adapter acts, NaN and -0.0 included."""
    growth = make_growth()
    state = make_state(growth, {0: ("gelu", stage, 0.6), 1: ("silu", stage, 0.3)})
    x = normal(4, 7, seed=2).astype(dtype).at[0].set(-0.0)
    if dtype == jnp.float32:
        x = x.at[1, 6].set(NAN_PAYLOAD)
    usual, exact = (_grown(growth.seeds(state, exact=exact), x) for exact in (False, True))
    assert exact.dtype == dtype
    np.testing.assert_allclose(
        np.float32(exact), np.float32(usual), rtol=1e-6 if dtype == jnp.float32 else 1e-2
    )
    assert same_bits(exact[:, 5:], x[:, 5:])
    assert same_bits(exact, x) != ACTS[stage]


def gradients(growth: ef.Growth, rows: Any, *, exact: bool) -> Point:
    state = make_state(growth, rows)
    point = Point(PARAMS, state.adapters, X)
    graded: Point = jit(jax.grad(make_loss(growth, state, exact=exact)))(point)
    return graded


def test_the_gradient_is_the_usual_one_where_all_gains_are_1() -> None:
    growth = make_growth()
    exact = gradients(growth, FULL, exact=True)
    assert not is_zero(exact.adapters)
    close(exact, gradients(growth, FULL, exact=False))


@pytest.mark.parametrize("stage", [stage for stage in Stage if ACTS[stage]])
def test_an_adapter_that_acts_by_alpha_gets_alpha_of_the_usual_gradient(stage: Stage) -> None:
    """What the host gets is the same; frozen, the usual gradient of the adapter is 0."""
    rows = {2: ("gelu", stage, 0.25)}
    exact = gradients(make_growth(), rows, exact=True)
    usual = gradients(make_growth(), rows, exact=False)
    close((exact.params, exact.x), (usual.params, usual.x))
    close(exact.adapters, jax.tree.map(lambda leaf: 0.25 * leaf, usual.adapters))
    assert not is_zero(exact.adapters)

    frozen = make_growth(freeze=(stage,))
    assert is_zero(gradients(frozen, rows, exact=False).adapters)
    assert same_bits(gradients(frozen, rows, exact=True), exact)


def test_an_adapter_that_learns_without_acting_has_no_derivative() -> None:
    rows = {0: ("gelu", Stage.TRAINING, 0.0)}
    exact = gradients(make_growth(), rows, exact=True)
    usual = gradients(make_growth(), rows, exact=False)
    close((exact.params, exact.x), (usual.params, usual.x))
    assert is_zero(exact.adapters)
    assert not is_zero(usual.adapters)


# --- numbers that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 1e15])
@pytest.mark.parametrize("seed", [0, None])
def test_a_slot_that_does_not_act_reaches_no_derivative(value: float, seed: int | None) -> None:
    """Neither that of an adapter in TRAINING nor a free one, whatever it contains.

    With 1e15 all outputs are finite, but the derivative of `gelu` is NaN.
    """
    growth, quiet, _, _, _ = setting()
    start = int(quiet.seeds.slot[0])
    slot = start if seed == 0 else next(s for s in range(3) if int(quiet.owner[s]) < 0)
    bank = jax.tree.map(lambda leaf: leaf.at[slot].set(value), quiet.adapters["hidden"]["gelu"])
    hidden = {**quiet.adapters["hidden"], "gelu": bank}
    broken = Point(PARAMS, {**quiet.adapters, "hidden": hidden}, X)

    @jit
    def derivatives(point: Point) -> Any:
        loss, ones = make_loss(growth, quiet), jax.tree.map(jnp.ones_like, point)
        return jax.jvp(loss, (point,), (ones,)), jax.jvp(jax.grad(loss), (point,), (ones,))

    assert same_bits(derivatives(broken), derivatives(Point(PARAMS, quiet.adapters, X)))


def test_an_adapter_that_breaks_counts_as_constant() -> None:
    """Some of its outputs are finite and act; there is no derivative through any of them."""
    growth = make_growth()
    state = make_state(growth, {2: ("gelu", Stage.FOSSILIZED, 1.0)})
    slot, hidden = int(state.seeds.slot[2]), state.adapters["hidden"]
    up = hidden["gelu"]["up"].at[slot, :, 0].set(jnp.inf)
    hidden = {**hidden, "gelu": {**hidden["gelu"], "up": up}}
    state = state._replace(adapters={**state.adapters, "hidden": hidden})
    seeds = growth.seeds(state, exact=True)
    x, t = normal(4, 7, seed=2), normal(4, 7, seed=3)
    y, pushed = jax.jvp(lambda x: _grown(seeds, x), (x,), (t,))
    assert same_bits(pushed, t)
    assert same_bits(y[:, 5], x[:, 5])
    assert not np.any(np.asarray(y[:, 6] == x[:, 6]))
    np.testing.assert_allclose(y, _grown(growth.seeds(state), x), rtol=1e-6)
    graded = jax.grad(make_loss(growth, state))(Point(PARAMS, state.adapters, X))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(graded))
    assert is_zero(graded.adapters)


# --- under other transformations -----------------------------------------------------------------


def curvature(loss: Any, point: Point) -> Any:
    """The gradient, and the Hessian times ones: forward over reverse."""
    return jax.jvp(jax.grad(loss), (point,), (jax.tree.map(jnp.ones_like, point),))


@cache
def _curvature() -> Any:
    _, _, loss, point, _ = setting()
    return jit(lambda point: curvature(loss, point))(point)


def test_remat_changes_no_derivative() -> None:
    growth, state, _, point, _ = setting()
    saving = make_loss(growth, state, wrap=jax.checkpoint)
    close(jit(lambda point: curvature(saving, point))(point), _curvature())


def test_other_loops_of_training_change_no_derivative() -> None:
    """`adapters_at_once` says how training computes; the exact view computes all slots anyway."""
    _, _, _, point, _ = setting()
    growth = make_growth(None)
    loss = make_loss(growth, make_state(growth))
    close(jit(lambda point: curvature(loss, point))(point), _curvature())


def test_vmap_over_examples_adds_up() -> None:
    _, _, loss, point, _ = setting()

    @jit
    def total(point: Point) -> Any:
        each = jax.vmap(lambda x: curvature(loss, point._replace(x=x[None])))(point.x)
        summed: Any = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each)
        return each, summed

    each, summed = total(point)
    for got, rows, want in zip(summed, each, _curvature(), strict=True):
        close((got.params, got.adapters), (want.params, want.adapters))
        close(rows.x[:, 0], want.x)


def test_vmap_over_states_is_a_loop_over_them() -> None:
    growth, state, _, _, _ = setting()
    members = [state, make_state(growth, FULL), make_state(growth, {})]

    def curved(state: Any) -> Any:
        return curvature(make_loss(growth, state), Point(PARAMS, state.adapters, X))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    got = jit(jax.vmap(curved))(stacked)
    for index, member in enumerate(members):
        mine = jax.tree.map(lambda leaf, i=index: leaf[i], got)
        close(mine, jit(curved)(member))


def test_a_layer_taken_by_its_index_is_that_of_the_scan() -> None:
    growth, state, _, _, _ = setting()
    seeds, y = growth.seeds(state, exact=True), normal(4, 5)

    def scanned(y: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, own: (own.grow("deep", y), None), y, seeds.layers("deep"))[0]

    def unrolled(y: jax.Array) -> jax.Array:
        for index in range(2):
            y = seeds.layer("deep", index).grow("deep", y)
        return y

    close(jit(jax.jacfwd(scanned))(y), jit(jax.jacrev(unrolled))(y))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_a_mesh(kind: AxisType) -> None:
    _, _, loss, point, _ = setting()
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(kind,))):
        close(jit(lambda point: curvature(loss, point))(point), _curvature())


def test_under_shard_map() -> None:
    sharded.check_exact(1)


def test_the_view_enters_a_jit_without_tracing_it_anew() -> None:
    growth, state, _, _, _ = setting()
    traces = []

    @jax.jit
    def evaluate(seeds: Any) -> jax.Array:
        traces.append(None)
        return loss_fn(PARAMS, seeds, X)

    other = make_state(growth, FULL)
    for each in (state, other):
        evaluate(growth.seeds(each, exact=True))
    assert len(traces) == 1
    evaluate(growth.seeds(state))
    assert len(traces) == 2


# --- blueprints and arguments --------------------------------------------------------------------

OFFERED = {
    "noop": (ef.blueprints.noop(), "vector"),
    "scale_shift": (ef.blueprints.scale_shift(), "vector"),
    "low_rank": (ef.blueprints.low_rank(2), "vector"),
    "relu": (ef.blueprints.bottleneck(3), "vector"),
    "paired": (ef.blueprints.bottleneck(4, birth="paired"), "vector"),
    "gated": (ef.blueprints.gated(2), "vector"),
    "normalised": (ef.blueprints.normalised(2), "vector"),
    "self_attention": (ef.blueprints.self_attention(), "sequence"),
    "bottleneck_conv": (ef.blueprints.bottleneck_conv(2), "image"),
    "depthwise_conv": (ef.blueprints.depthwise_conv(), "image"),
    "squeeze_excite": (ef.blueprints.squeeze_excite(), "image"),
}
SHAPES = {"vector": (3,), "sequence": (2, 4), "image": (2, 3, 3)}


@pytest.mark.parametrize("name", OFFERED)
def test_every_blueprint_has_both_modes(name: str) -> None:
    """`<c, J t> = <J^T c, t>`, and the same for the Hessian of a loss, which is symmetric."""
    blueprint, topology = OFFERED[name]
    growth = ef.Growth(
        sites=[ef.site("a", features=9, chunks=2, topology=topology)],
        blueprints={name: blueprint},
        capacity=2,
    )
    state = place(growth, blank(growth), {1: (name, Stage.FINE_TUNING, 0.5)})
    shape = (*SHAPES[topology], 9)
    point = state.adapters, normal(*shape)
    row, restore = ravel_pytree(point)

    def grow(row: jax.Array) -> jax.Array:
        adapters, x = restore(row)
        return growth.seeds(state._replace(adapters=adapters), exact=True).grow("a", x)

    c, t, s = normal(*shape, seed=3), normal(row.size, seed=4), normal(row.size, seed=5)

    @jit
    def products(row: jax.Array) -> Any:
        pushed, pulled = jax.jvp(grow, (row,), (t,))[1], jax.vjp(grow, row)[1](c)[0]
        slope = jax.grad(lambda row: jnp.sum(jnp.square(grow(row) - c)))
        curved = [jax.jvp(slope, (row,), (v,))[1] for v in (t, s)]
        return jnp.vdot(c, pushed), pulled @ t, curved[0] @ s, curved[1] @ t

    first, adjoint, second, mirrored = products(row)
    np.testing.assert_allclose(first, adjoint, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, mirrored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [None, 1, "yes", np.bool_(True), jnp.bool_(True)])
def test_exact_is_a_bool(value: Any) -> None:
    growth, state, _, _, _ = setting()
    with pytest.raises(TypeError, match=r"exact must be a bool, got .*pass True or False"):
        growth.seeds(state, exact=value)
