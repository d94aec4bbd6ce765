"""Run by `test_explicit_axes.py` in a process with two devices: divided data, features, members."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import QUICK, blank, place, standard

import esper_fn as ef
from esper_fn.lifecycle import Stage

ROWS = {
    0: ("gelu", Stage.TRAINING, 0.0),
    2: ("gelu", Stage.GRAFTING, 0.5),
    3: ("gelu", Stage.EVALUATING, 1.0),
    5: ("gelu", Stage.FINE_TUNING, 0.7),
    8: ("gelu", Stage.FINE_TUNING, 0.6),
}
WHOLE = PartitionSpec()
STEPS, EVERY = 5, 2
GROWTH = ef.Growth(
    sites=[
        ef.site("hidden", features=12, chunks=5),
        ef.site("over", source_features=12, features=6, chunks=2),
        ef.site("deep", features=6, chunks=2, layers=2),
    ],
    blueprints={"gelu": ef.blueprints.bottleneck(3, activation="gelu")},
    capacity=3,
    policy=ef.policies.chain(ef.policies.periodic(every=1), ef.policies.budget(300)),
    directed_births=1,
)
OPTIMIZER = ef.optim.per_adapter(standard(optax.adam(0.01)))


def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    h = seeds.grow("hidden", jnp.tanh(x @ params["in"]))
    if AxisType.Explicit in jax.typeof(h).sharding.mesh.axis_types and is_divided(h, -1):
        # Which the person has to say: by what to divide a product over a divided axis.
        h = jax.sharding.reshard(h, WHOLE)
    out = seeds.grow("over", h @ params["out"], source=h)
    out, _ = jax.lax.scan(
        lambda out, own: (own.grow("deep", jnp.tanh(out)), None), out, seeds.layers("deep")
    )
    return jnp.mean(jnp.square(out - 1))


def is_divided(x: jax.Array, axis: int) -> bool:
    spec = [*jax.typeof(x).sharding.spec, *[None] * x.ndim][: x.ndim]
    return spec[axis] is not None


def setting() -> Any:
    state = place(GROWTH, blank(GROWTH), ROWS)
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.standard_normal((4, 12)) * 0.5, jnp.float32),
        "out": jnp.asarray(rng.standard_normal((12, 6)) * 0.4, jnp.float32),
    }
    x = jnp.asarray(rng.standard_normal((STEPS, 8, 4)), jnp.float32)
    return params, state, x


def once(params: Any, state: Any, x: jax.Array) -> Any:
    """Gradients, statistics, a survey, and a Hessian-vector product of the exact view."""
    graded = GROWTH.value_and_grad(loss_fn)(params, state, x)
    seeds, ones = GROWTH.seeds(state, exact=True), jax.tree.map(jnp.ones_like, params)
    slope = jax.grad(lambda params: loss_fn(params, seeds, x))
    curvature = jax.jvp(slope, (params,), (ones,))[1]
    return graded, GROWTH.survey(loss_fn)(params, state, x)[1], curvature


def run(params: Any, state: Any, x: jax.Array) -> Any:
    """Whole steps with snapshots, one survey before every other."""
    step = ef.runtime.make_step(GROWTH, loss_fn, OPTIMIZER, survey_every=EVERY)
    start = ef.runtime.init(OPTIMIZER, params, state, snapshot_every=2)
    after, infos = ef.runtime.scan_steps(step)(start, x, x[0])
    return after.params, infos.loss, infos.stage, infos.request_code, infos.evidence


def close(got: Any, want: Any, name: str) -> None:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for got_array, other in [(np.asarray(ours), np.asarray(theirs)) for ours, theirs in pairs]:
        if np.issubdtype(other.dtype, np.floating):
            np.testing.assert_allclose(got_array, other, rtol=2e-3, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(got_array, other, name)


def jit(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)


def check(kind: AxisType, division: str, expected: Any) -> None:
    params, state, x = setting()
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))

    def divide(value: Any, *spec: Any) -> Any:
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))

    if division == "data":
        x = divide(x, None, "d")
    else:
        params = {"in": divide(params["in"], None, "d"), "out": divide(params["out"])}
    name = f"{kind.name} {division}"
    with jax.set_mesh(mesh):
        close(jit(once)(params, state, x[0]), expected["once"], name)
        close(jit(run)(params, state, x), expected["run"], f"{name}, whole steps")


if __name__ == "__main__":
    params, state, x = setting()
    expected = {"once": jit(once)(params, state, x[0]), "run": jit(run)(params, state, x)}
    assert (np.asarray(expected["run"][2]) == Stage.GERMINATED).any()
    for division in sys.argv[1:]:
        check(AxisType.Explicit, division, expected)
        if division == "data":
            continue  # `sharded.py` has it
        check(AxisType.Auto, division, expected)
