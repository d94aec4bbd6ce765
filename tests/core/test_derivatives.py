"""Derivatives of derivatives: through the control flow, the forward, and whole training steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import QUICK, blank, place, same_bits, standard

import esper_fn as ef
from esper_fn._control import once_if
from esper_fn._layout import make_layout
from esper_fn.lifecycle import Stage

LAYOUT = make_layout(
    sites=[
        ef.site("hidden", features=7, chunks=3),
        ef.site("over", source_features=7, features=5, chunks=2),
    ],
    blueprints={"gelu": ef.blueprints.bottleneck(3, activation="gelu")},
    capacity=3,
)
ROWS = {
    0: ("gelu", Stage.TRAINING, 0.0),
    1: ("gelu", Stage.FINE_TUNING, 0.7),
    2: ("gelu", Stage.FOSSILIZED, 1.0),
    4: ("gelu", Stage.FINE_TUNING, 0.4),
}


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)


PARAMS = {"in": _normal(4, 7), "out": _normal(7, 5)}
X = _normal(6, 4, seed=1)


def model(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    h = seeds.grow("hidden", jnp.tanh(x @ params["in"]))
    return seeds.grow("over", h @ params["out"], source=h)


def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model(params, seeds, x) - 1))


def penalised(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    slope = jax.grad(lambda x: jnp.sum(jnp.square(model(params, seeds, x))))(x)
    return loss_fn(params, seeds, x) + jnp.mean(jnp.square(slope))


def setting(at_once: int | None, rows: Any = None) -> tuple[ef.Growth, ef.GrowthState]:
    growth = ef.Growth(**LAYOUT.arguments, adapters_at_once=at_once, policy=ef.policies.never())
    return growth, place(growth, blank(growth), ROWS if rows is None else rows)


def _close(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_wanted", [True, False])
def test_once_if_has_the_derivatives_of_a_conditional(is_wanted: bool) -> None:
    def loop(x: jax.Array, times: jax.Array) -> jax.Array:
        def run(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            value, count = carry
            inner = once_if(times > 2, lambda value_now: value_now * jnp.sin(x), value)
            return inner * times.astype(jnp.float32), count + times

        value, count = once_if(jnp.bool_(is_wanted), run, (x * x, jnp.int32(1)))
        return jnp.sum(value) * count.astype(jnp.float32)

    def plain(x: jax.Array, times: jax.Array) -> jax.Array:
        turned = jnp.where(times > 2, jnp.sin(x), 1.0) * times.astype(jnp.float32)
        factor = turned * (1 + times).astype(jnp.float32) if is_wanted else 1.0
        return jnp.sum(x * x * factor)

    x, times = _normal(3), jnp.int32(3)
    for derive in (jax.grad, jax.jacfwd, jax.hessian):
        _close(jax.jit(derive(loop))(x, times), derive(plain)(x, times))
    many = jnp.stack([x, 2 * x]), jnp.asarray([2, 3], jnp.int32)
    _close(jax.vmap(jax.grad(loop))(*many), jax.vmap(jax.grad(plain))(*many))


@pytest.mark.slow
def test_a_gradient_penalty_is_the_same_in_a_loop_and_in_one_go() -> None:
    results = []
    for at_once in (1, 2, None):
        growth, state = setting(at_once)
        graded = jax.jit(growth.value_and_grad(penalised), compiler_options=QUICK)
        results.append(graded(PARAMS, state, X)[:2])
    _close(results[0], results[2])
    _close(results[1], results[2])


def test_a_gradient_penalty_over_fossils_is_that_of_the_plain_network() -> None:
    """With act = feel = 1 an adapter is a part of the host like any other."""
    growth, state = setting(1, {2: ("gelu", Stage.FOSSILIZED, 1.0)})

    class Plain:
        def grow(self, name: str, x: jax.Array, *, source: Any = None) -> jax.Array:
            del source
            if name != "hidden":
                return x
            slot = int(state.seeds.slot[2])
            adapter = jax.tree.map(lambda leaf: leaf[slot], state.adapters["hidden"]["gelu"])
            # Chunks of 3, 2 and 2 features; the third one's adapter has a padded row.
            u = jnp.pad(x[:, 5:], ((0, 0), (0, 1)))
            hidden = jax.nn.gelu(u @ adapter["down"] + adapter["bias"][None])
            return x.at[:, 5:].add((hidden @ adapter["up"])[:, :2])

    want = jax.value_and_grad(lambda params: penalised(params, Plain(), X))(PARAMS)
    value, (d_params, _), _ = growth.value_and_grad(penalised)(PARAMS, state, X)
    _close((value, d_params), want)


def test_a_penalty_on_the_host_does_not_feel_an_adapter_in_training() -> None:
    growth, state = setting(1, {0: ("gelu", Stage.TRAINING, 0.0)})
    graded = jax.jit(growth.value_and_grad(penalised))
    value, (d_params, d_adapters), _ = graded(PARAMS, state, X)
    quiet, (d_quiet, _), _ = graded(PARAMS, setting(1, {})[1], X)
    assert same_bits((value, d_params), (quiet, d_quiet))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(d_adapters))


@pytest.mark.slow
def test_gradients_go_through_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss after two steps, with respect to where they began: as through `jax.lax.cond`."""

    def outer(growth: ef.Growth, state: ef.GrowthState) -> Any:
        optimizer = ef.optim.per_adapter(standard(optax.adam(1e-2, eps_root=1e-8)))

        def run(params: Any) -> jax.Array:
            now, opt_state = state, optimizer.init((params, state.adapters))
            for _ in range(2):
                loss, grads, statistics = growth.value_and_grad(loss_fn)(params, now, X)
                updates, opt_state = optimizer.update(
                    grads, opt_state, (params, now.adapters), slots=growth.slots(now)
                )
                params, adapters = optax.apply_updates((params, now.adapters), updates)
                now, _ = growth.update(now, adapters, statistics, loss)
            return loss_fn(params, growth.seeds(now), X)

        return jax.jit(jax.value_and_grad(run), compiler_options=QUICK)(PARAMS)

    ours = [outer(*setting(at_once)) for at_once in (1, None)]

    def conditional(is_wanted: jax.Array, run: Any, carry: Any) -> Any:
        return jax.lax.cond(is_wanted, run, lambda carry: carry, carry)

    for module in ("optim._per_adapter", "_growth._update"):
        monkeypatch.setattr(f"esper_fn.{module}.once_if", conditional)
    want = outer(*setting(None))
    assert float(optax.tree.norm(want[1])) > 0
    _close(ours[0], want)
    _close(ours[1], want)


@pytest.mark.parametrize("is_alive", [True, False])
@pytest.mark.parametrize("at_once", [1, None])
def test_an_adapter_that_breaks_reaches_no_second_derivative(
    is_alive: bool, at_once: int | None
) -> None:
    """Alive, or left in a free slot: its products overflow, and 0 times infinity is NaN."""
    growth, quiet = setting(at_once, {})
    slot = int(setting(at_once, {0: ROWS[0]})[1].seeds.slot[0])
    state = setting(at_once, {0: ROWS[0]} if is_alive else {})[1]
    huge = jax.tree.map(lambda leaf: leaf.at[slot].set(1e30), state.adapters["hidden"])
    graded = jax.jit(growth.value_and_grad(penalised))
    broken = state._replace(adapters={**state.adapters, "hidden": huge})
    value, (d_params, d_adapters), statistics = graded(PARAMS, broken, X)
    want, (d_want, _), _ = graded(PARAMS, quiet, X)
    assert same_bits((value, d_params), (want, d_want))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(d_adapters))
    assert (float(statistics.num_errors[0]) > 0) == is_alive


@pytest.mark.slow
def test_no_tracer_leaks() -> None:
    growth, state = setting(1)
    with jax.checking_leaks():
        loss, (_, adapters), statistics = jax.jit(growth.value_and_grad(penalised))(
            PARAMS, state, X
        )
        jax.block_until_ready(jax.jit(growth.update)(state, adapters, statistics, loss))
