"""Sites computed by `esper_kernels` instead of loops: the same numbers, the same decisions.

`reference` takes the way that a GPU kernel takes and runs anywhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import QUICK, blank, make_step, place, same_bits, standard

import esper_fn as ef
import esper_kernels
from esper_fn._layout import make_layout
from esper_fn.lifecycle import Stage
from esper_fn.types import Layout


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)


def layout(features: int, chunks: int, **options: Any) -> Layout:
    return make_layout(
        sites=[ef.site("here", features=features, chunks=chunks, topology="sequence", **options)],
        blueprints={
            "low_rank": ef.blueprints.low_rank(2),
            "silu": ef.blueprints.bottleneck(3, activation="silu"),
            "normalised": ef.blueprints.normalised(2),
            "gated": ef.blueprints.gated(2),
        },
        capacity=2,
    )


ROWS = {
    0: ("silu", Stage.FINE_TUNING, 0.6),
    1: ("gated", Stage.GRAFTING, 0.5),
    2: ("low_rank", Stage.TRAINING, 0.0),
    3: ("normalised", Stage.FINE_TUNING, 0.9),
    5: ("low_rank", Stage.FOSSILIZED, 1.0),
    6: ("gated", Stage.GERMINATED, 0.0),
}


def ran(implementation: Any, features: int, dtype: Any, rows: Any = None) -> Any:
    """Loss, gradients and statistics of one site."""
    growth = ef.Growth(**layout(features, 7).arguments, implementation=implementation)
    state = place(growth, blank(growth), ROWS if rows is None else rows)
    # Known, as after some steps: an adapter in TRAINING learns, damped by 0.25 over the default
    # trust.
    telemetry = state.seeds.telemetry._replace(gradient_scale=jnp.full((7,), 0.25))
    state = state._replace(seeds=state.seeds._replace(telemetry=telemetry))

    def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x.astype(dtype) @ params.astype(dtype))
        wide = seeds.grow("here", h).astype(jnp.float32)
        return jnp.mean(jnp.square(wide - 1) * _normal(1, 1, features, seed=3))

    graded = jax.jit(growth.value_and_grad(loss_fn), compiler_options=QUICK)
    return graded(_normal(5, features), state, _normal(3, 4, 5, seed=1))


@pytest.mark.parametrize("features", [28, 25])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_values_gradients_and_statistics_are_those_of_the_loops(
    features: int, dtype: str, tolerance: float
) -> None:
    got, want = (ran(kind, features, jnp.dtype(dtype)) for kind in ("reference", "loops"))
    for ours, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = 1e-6 + float(np.max(np.abs(other)))
        np.testing.assert_allclose(ours, other, rtol=tolerance, atol=tolerance * scale)
    assert got[2].num_live.tolist() == [1, 1, 1, 1, 0, 1, 0]


def test_auto_takes_the_loops_where_no_kernel_can_run() -> None:
    got, want = (ran(kind, 28, jnp.float32) for kind in ("auto", "loops"))
    assert same_bits(got, want)


def test_a_forced_kernel_says_why_it_cannot_run() -> None:
    with pytest.raises(esper_kernels.UnavailableError, match=r"pallas.*needs"):
        ran("pallas", 28, jnp.float32)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'auto', 'loops', 'pallas', 'reference'.*got 'fast'"):
        ef.Growth(**layout(28, 7).arguments, implementation="fast")  # type: ignore[arg-type]


def test_the_hosts_bits_do_not_depend_on_quiet_seeds() -> None:
    rows = {0: ("silu", Stage.TRAINING, 0.0), 3: ("gated", Stage.TRAINING, 0.0)}
    value, (d_params, d_adapters), _ = ran("reference", 28, jnp.bfloat16, rows)
    quiet, (d_quiet, _), _ = ran("reference", 28, jnp.bfloat16, {})
    assert same_bits((value, d_params), (quiet, d_quiet))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(d_adapters))


@pytest.mark.slow
def test_a_run_takes_the_same_decisions() -> None:
    """A stack of layers under `scan`, 60 steps with surveys, germinations and removals."""
    chosen = layout(12, 3, layers=2)
    params = {"in": _normal(4, 12), "deep": _normal(2, 12, 12), "out": _normal(12, 1)}
    x = _normal(8, 3, 4, seed=2)

    def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, parts: Any) -> Any:
            weights, own = parts
            return own.grow("here", jnp.tanh(h @ weights)), None

        deep = (params["deep"], seeds.layers("here"))
        h, _ = jax.lax.scan(layer, x @ params["in"], deep)
        return jnp.mean(jnp.square(h @ params["out"] - jnp.sin(3 * x[..., :1])))

    def drive(implementation: Any) -> Any:
        growth = ef.Growth(
            **chosen.arguments,
            policy=ef.policies.periodic(every=5, score="gradient"),
            graft=ef.grafting.linear(num_steps=8),
            settings=ef.lifecycle.settings(
                min_steps=dict.fromkeys([Stage.TRAINING, Stage.EVALUATING], 2),
                max_steps={Stage.TRAINING: 10},
            ),
            implementation=implementation,
        )
        optimizer = ef.optim.per_adapter(standard(optax.sgd(0.05)))
        state = blank(growth)
        now, carry, steps = params, optimizer.init((params, state.adapters)), []
        step = make_step(growth, loss_fn, optimizer)
        survey = jax.jit(growth.survey(loss_fn))
        for index in range(60):
            if index % 10 == 9:
                state, _ = survey(now, state, x)
            now, state, carry, info = step(now, state, carry, x, growth.commands(size=1))
            steps.append((np.asarray(info.stage), np.asarray(info.request_code), float(info.loss)))
        return steps

    ours, want = drive("reference"), drive("loops")
    for (stage, code, loss), (other_stage, other_code, other_loss) in zip(ours, want, strict=True):
        np.testing.assert_array_equal(stage, other_stage)
        np.testing.assert_array_equal(code, other_code)
        np.testing.assert_allclose(loss, other_loss, rtol=1e-3)
    assert len({stage for row, _, _ in want for stage in row.tolist()}) >= 4
