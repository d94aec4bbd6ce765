"""Run by `test_nesting.py` in a process of its own, with two devices: the same run, sharded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import QUICK, blank, place, standard

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.lifecycle import Stage

LAYOUT = make_layout(
    sites=[
        ef.site("hidden", features=11, chunks=3),
        ef.site("over", source_features=11, features=6, chunks=2),
    ],
    blueprints={"gelu": ef.blueprints.bottleneck(3, activation="gelu")},
    capacity=3,
)
ROWS = {
    0: ("gelu", Stage.TRAINING, 0.0),
    2: ("gelu", Stage.GRAFTING, 0.5),
    3: ("gelu", Stage.FINE_TUNING, 0.7),
}


def local_loss(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    h = seeds.grow("hidden", jnp.tanh(x @ params["in"]))
    return jnp.mean(jnp.square(seeds.grow("over", h @ params["out"], source=h) - 1))


def setting() -> Any:
    growth = ef.Growth(
        **LAYOUT.arguments, adapters_at_once=1, policy=ef.policies.never(), directed_births=1
    )
    state = place(growth, blank(growth), ROWS)
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.standard_normal((5, 11)) * 0.5, jnp.float32),
        "out": jnp.asarray(rng.standard_normal((11, 6)) * 0.4, jnp.float32),
    }
    optimizer = ef.optim.per_adapter(standard(optax.sgd(0.1)))
    opt_state = optimizer.init((params, state.adapters))
    x = jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
    return growth, optimizer, (params, state, opt_state), x


def make_run(growth: Any, optimizer: Any, loss_fn: Any, steps: int = 6) -> Any:
    """`steps` training steps in one program."""

    def step(carry: Any, _: Any, x: jax.Array) -> Any:
        params, state, opt_state = carry
        loss, grads, statistics = growth.value_and_grad(loss_fn)(params, state, x)
        updates, opt_state = optimizer.update(
            grads, opt_state, (params, state.adapters), slots=growth.slots(state)
        )
        params, adapters = optax.apply_updates((params, state.adapters), updates)
        state, info = growth.update(state, adapters, statistics, loss)
        return (params, state, opt_state), (loss, statistics, info.stage, info.alpha)

    def run(carry: Any, x: jax.Array) -> Any:
        return jax.lax.scan(lambda c, _: step(c, _, x), carry, None, length=steps)

    return run


def compare(statistics: Any, totals: Any, per_call: float) -> None:
    """The same sums to tolerance; counts of calls times the devices."""
    for name in statistics._fields:
        times = per_call if name in {"num_features", "num_live"} else 1.0
        np.testing.assert_allclose(
            getattr(statistics, name),
            times * np.asarray(getattr(totals, name)),
            rtol=1e-4,
            atol=1e-6,
            err_msg=name,
        )


def check_gradients(num_devices: int) -> Any:
    """Under `shard_map` in the loss or around it, and under automatic sharding."""
    assert len(jax.devices()) == num_devices
    growth, optimizer, carry, x = setting()
    params, state, _ = carry
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("data")

    def mean_loss(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        return jax.lax.pmean(local_loss(params, seeds, x), "data")

    def sharded_loss(params: Any, seeds: Any, x: jax.Array) -> Any:
        return jax.shard_map(mean_loss, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole)(
            params, seeds, x
        )

    around = jax.shard_map(
        growth.value_and_grad(mean_loss),
        mesh=mesh,
        in_specs=(whole, whole, split),
        out_specs=whole,
    )

    def run(graded: Any, x: jax.Array) -> Any:
        return jax.jit(graded, compiler_options=QUICK)(params, state, x)

    untracked = jax.shard_map(
        lambda params, state, x: growth.value_and_grad(local_loss)(params, state, x)[1],
        mesh=mesh,
        in_specs=(whole, whole, whole),
        out_specs=whole,
        check_vma=False,
    )
    want, want_grads, totals = run(growth.value_and_grad(local_loss), x)
    for got, other in zip(
        jax.tree.leaves(run(untracked, x)), jax.tree.leaves(want_grads), strict=True
    ):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5)
    placed = jax.device_put(x, NamedSharding(mesh, split))
    ways = [(growth.value_and_grad(sharded_loss), x, float(num_devices))]
    if num_devices > 1:
        ways += [(around, x, float(num_devices)), (growth.value_and_grad(local_loss), placed, 1.0)]
    for graded, batch, per_call in ways:
        value, grads, statistics = run(graded, batch)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        for got, other in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
            np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5)
        compare(statistics, totals, per_call)
    return growth, optimizer, carry, x, sharded_loss


def check_decisions(num_devices: int) -> None:
    """Whole training steps on one device and on all of them."""
    growth, optimizer, carry, x, sharded_loss = check_gradients(num_devices)
    _, (loss, statistics, *decisions) = jax.jit(
        make_run(growth, optimizer, sharded_loss), compiler_options=QUICK
    )(carry, x)
    _, (want, totals, *decided) = jax.jit(
        make_run(growth, optimizer, local_loss), compiler_options=QUICK
    )(carry, x)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    compare(statistics, totals, num_devices)
    for ours, plain in zip(decisions, decided, strict=True):
        np.testing.assert_array_equal(ours, plain)


def check_members(num_devices: int) -> None:
    """A network of its own on every device, whole steps inside the `shard_map`."""
    growth, optimizer, carry, x = setting()
    mesh = jax.make_mesh((num_devices,), ("members",), axis_types=(AxisType.Auto,))
    own = PartitionSpec("members")
    train = make_run(growth, optimizer, local_loss)

    def run(carry: Any, x: jax.Array) -> Any:
        (params, state, opt_state), totals = train(carry, x)
        state, measured = growth.survey(local_loss)(params, state, x)
        return (params, state, opt_state), (totals, measured)

    scaled = [(1 + 0.2 * member) * x for member in range(num_devices)]

    def single(carry: Any, x: jax.Array) -> Any:
        member = jax.tree.map(lambda leaf: leaf[0], carry)
        return jax.tree.map(lambda leaf: leaf[None], run(member, x[0]))

    whole = jax.shard_map(single, mesh=mesh, in_specs=(own, own), out_specs=own)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_devices), carry)
    after, totals = jax.jit(whole, compiler_options=QUICK)(stacked, jnp.stack(scaled))
    for member, mine in enumerate(scaled):
        want = jax.jit(run, compiler_options=QUICK)(carry, mine)
        for got, other in zip(jax.tree.leaves((after, totals)), jax.tree.leaves(want), strict=True):
            if jnp.issubdtype(other.dtype, jnp.floating):
                np.testing.assert_allclose(got[member], other, rtol=1e-4, atol=1e-6)
            elif not jnp.issubdtype(other.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(got[member], other)


def check_exact(num_devices: int) -> None:
    """Hessian-vector products of the exact view, forward over reverse inside a `shard_map`."""
    growth, _, (params, state, _), x = setting()
    seeds = growth.seeds(state, exact=True)
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("data")

    def curvature(loss_fn: Any, params: Any, seeds: Any, x: jax.Array) -> Any:
        slope = jax.grad(lambda params: loss_fn(params, seeds, x))
        return jax.jvp(slope, (params,), (jax.tree.map(jnp.ones_like, params),))

    def mean_loss(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        return jax.lax.pmean(local_loss(params, seeds, x), "data")

    around = jax.shard_map(
        lambda params, seeds, x: curvature(mean_loss, params, seeds, x),
        mesh=mesh,
        in_specs=(whole, whole, split),
        out_specs=whole,
    )
    run = jax.jit(around, compiler_options=QUICK)(params, seeds, x)
    want = jax.jit(
        lambda params, seeds, x: curvature(local_loss, params, seeds, x), compiler_options=QUICK
    )(params, seeds, x)
    for got, other in zip(jax.tree.leaves(run), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    check_exact(2)
    check_decisions(2)
    check_members(2)
