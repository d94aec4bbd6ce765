"""What growth costs a training step on this machine, and the lifecycle step of many seeds."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_fn as ef
from benchmarks._timing import Row, exact, ratio, summarise, time_interleaved
from esper_fn import policies, runtime
from esper_fn.demo import hosts
from esper_fn.lifecycle import Stage
from esper_fn.lifecycle._state import state_bytes_per_seed
from esper_fn.types import Statistics

Runner = Callable[[], object]


def measure(*, quick: bool) -> Mapping[str, Row]:
    """All rows; `quick` takes fewer samples."""
    rows: dict[str, Row] = {"state_bytes_per_seed": exact(state_bytes_per_seed(), "bytes")}
    rows |= lifecycle_rows("10k", 10_000, repeats=60 if quick else 400)
    rows |= lifecycle_rows("1m", 1_000_000, repeats=20 if quick else 80)
    rows |= _training_rows(repeats=8 if quick else 400)
    rows |= _many_seeds(steps=4 if quick else 12)
    return rows


# --- the lifecycle and policy step alone -----------------------------------------------------


def lifecycle_rows(label: str, num_seeds: int, *, repeats: int) -> dict[str, Row]:
    """`Growth.update` in a run with births every ten steps; steps with a birth in a row apart."""
    num_sites = 10
    width = num_seeds // num_sites
    growth = ef.Growth(
        sites=[ef.site(f"s{i}", features=width, chunks=width) for i in range(num_sites)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=64,
        policy=policies.chain(
            policies.periodic(every=10, count=4),
            policies.cooldown(5),
            policies.max_concurrent(400),
            policies.budget(2000),
        ),
        adapters_at_once=None,
    )
    source = np.random.default_rng(0)
    state = growth.init(jax.random.key(0))
    state = state._replace(
        seeds=state.seeds._replace(
            potential=jnp.asarray(source.random(num_seeds, np.float32)),
            num_potentials=jnp.ones((num_seeds,), jnp.int32),
        )
    )
    drawn = jnp.asarray(source.random((2, num_seeds), np.float32) + 0.1)
    ones, zeros = jnp.ones((num_seeds,)), jnp.zeros((num_seeds,))
    statistics = [
        Statistics(
            num_values=8 * ones,
            total=row,
            square=row + 1,
            num_features=ones,
            num_dead=zeros,
            gradient_square=row,
            num_live=ones,
            output_square=row,
            utility=row,
            num_errors=zeros,
        )
        for row in drawn
    ]
    losses = [jnp.float32(x) for x in 1 + 0.01 * source.standard_normal(16)]

    def update(state: Any, reading: Any, loss: Any) -> Any:
        adapters = jax.tree.map(lambda leaf: leaf * (1 + 1e-4), state.adapters)
        return growth.update(state, adapters, reading, loss)

    step = jax.jit(update, donate_argnums=0)
    usual: list[float] = []
    births: list[float] = []
    for index in range(-5, repeats):
        begun = time.perf_counter()
        state, info = step(state, statistics[index % 2], losses[index % 16])
        state.step.block_until_ready()  # all outputs of a program are ready together
        seconds = time.perf_counter() - begun
        if index >= 0:
            is_birth = bool(np.asarray(info.request_code == 1).any())
            (births if is_birth else usual).append(seconds)
    counts = runtime.stage_counts(np.asarray(state.seeds.stage))
    told = {"seeds": num_seeds, "counted": "Growth.update, donated state", "stages": counts}
    return {
        f"step_{label}_seeds": summarise(usual, "ms", **told),
        f"step_{label}_seeds_with_birth": summarise(births, "ms", **told),
    }


# --- a training step of a convolutional host -------------------------------------------------

BATCH = 128


def with_live(growth: ef.Growth, state: ef.GrowthState, seeds: list[int]) -> ef.GrowthState:
    """`state` with the seeds in FINE_TUNING, each with a slot of its own."""
    tables = growth.layout.tables
    rows, owner = jax.tree.map(np.array, state.seeds), np.array(state.owner)
    for seed in seeds:
        group = int(np.searchsorted(tables.group_start, seed, side="right")) - 1
        blueprint = int(np.flatnonzero(tables.pool_start[group] >= 0)[0])
        pool = tables.slot_pool_start == tables.pool_start[group, blueprint]
        slot = int(np.flatnonzero((owner == -1) & pool)[0])
        owner[slot], rows.slot[seed], rows.blueprint[seed] = seed, slot, blueprint
        rows.stage[seed], rows.alpha[seed] = Stage.FINE_TUNING, 0.5
    return state._replace(seeds=jax.tree.map(jnp.asarray, rows), owner=jnp.asarray(owner))


def _training_rows(*, repeats: int) -> dict[str, Row]:
    """One optimiser step: the bare host, and the host with 0, 1 and 64 live chunks of 64."""
    host = hosts.conv((28, 28, 1), (32, 64), hidden=128, classes=10, chunks=64)
    second = next(site for site in host.sites if site.name == "conv2")
    growth = ef.Growth(
        sites=host.sites,
        blueprints={
            "bottleneck_conv": ef.blueprints.bottleneck_conv(width=8),
            "bottleneck": ef.blueprints.bottleneck(width=8),
        },
        capacity=64,
        policy=policies.chain(policies.plateau(patience=10**6), policies.budget(10**6)),
        settings=ef.lifecycle.settings(
            min_steps={Stage.FINE_TUNING: 10**6}, max_steps={Stage.FINE_TUNING: 10**6}
        ),
    )
    transformation = optax.adamw(1e-3)
    optimizer = ef.optim.per_adapter(transformation)

    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        logits = host.apply(params, seeds, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    grow = runtime.make_step(growth, loss_fn, optimizer, survey_every=None)
    none = growth.commands(size=1)
    step = jax.jit(lambda state, batch: grow(state, batch, None, none), donate_argnums=0)

    def plain(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        loss, slopes = jax.value_and_grad(loss_fn)(params, ef.NoSeeds(), batch)
        updates, opt_state = transformation.update(slopes, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    source = np.random.default_rng(0)
    batches = [
        (
            jnp.asarray(source.random((BATCH, 28, 28, 1), np.float32)),
            jnp.asarray(source.integers(0, 10, BATCH), jnp.int32),
        )
        for _ in range(8)
    ]
    params = host.init(jax.random.key(0))
    blank = growth.init(jax.random.key(1))
    first = growth.layout.seed_index("conv2", 0)
    begun = time.perf_counter()
    starts = {
        name: runtime.init(
            optimizer,
            jax.tree.map(jnp.copy, params),
            with_live(growth, blank, [first + chunk for chunk in chunks]),
            snapshot_every=None,
        )
        for name, chunks in {
            "dormant": [],
            "one": [5],
            "all": list(range(second.chunks)),
        }.items()
    }
    # A buffer of its own for every leaf: each step donates its state.
    runners = {
        name: _stepper(step, jax.tree.map(jnp.copy, start), batches)
        for name, start in starts.items()
    }
    runners["dormant"]()
    compile_seconds = time.perf_counter() - begun
    carry = (jax.tree.map(jnp.copy, params), transformation.init(params))
    runners["bare"] = _stepper(jax.jit(plain, donate_argnums=0), carry, batches)
    samples = time_interleaved(runners, repeats=repeats, warmup=2)
    told = {"host": "conv 32-64, hidden 128", "batch": BATCH, "sites": len(host.sites)}
    return {
        "bare_step": summarise(samples["bare"], "ms", **told),
        "dormant_overhead": ratio(samples["dormant"], samples["bare"], **told),
        "one_live_of_64": ratio(samples["one"], samples["dormant"], **told),
        "all_live_of_64": ratio(samples["all"], samples["dormant"], **told),
        "compile": exact(compile_seconds, "s", **told),
    }


def _stepper(step: Any, state: Any, batches: list[Any]) -> Runner:
    box = [state, 0]

    def once() -> None:
        box[0], told = step(box[0], batches[box[1] % len(batches)])
        box[1] += 1
        jax.tree.leaves(told)[0].block_until_ready()  # all outputs are ready together

    return once


# --- a hundred thousand seeds ----------------------------------------------------------------


def _many_seeds(*, steps: int) -> dict[str, Row]:
    """`runtime.fit` of a transformer host with 100,000 seeds, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._many_seeds", str(steps)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = [float(word) for word in done.stdout.split()]
    seeds, peak_bytes, samples = figures[0], figures[1], figures[2:]
    return {
        "step_100k_seeds_transformer": summarise(samples, "s", seeds=int(seeds)),
        "peak_memory_100k_seeds_transformer": exact(peak_bytes / 2**30, "GiB", seeds=int(seeds)),
    }
