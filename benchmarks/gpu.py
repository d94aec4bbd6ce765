"""The core on a GPU: its lifecycle step, its sites by kernel and by loop, its decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_fn as ef
from benchmarks._records import BenchmarkError
from benchmarks._timing import Row, exact, ratio, summarise, time_interleaved
from benchmarks.lifecycle import lifecycle_rows, with_live
from esper_fn import policies
from esper_fn.demo import data, jobs
from esper_fn.types import Implementation

WIDTH, DEPTH, ROWS = 4096, 48, 4096


def measure(*, quick: bool) -> Mapping[str, Row]:
    """All rows; `quick` takes few samples."""
    if jax.default_backend() != "gpu":
        raise BenchmarkError("gpu needs an NVIDIA GPU, and JAX sees none.")
    repeats = 5 if quick else 30
    rows: dict[str, Row] = {}
    rows |= lifecycle_rows("10k", 10_000, repeats=10 * repeats)
    rows |= lifecycle_rows("1m", 1_000_000, repeats=10 * repeats)
    rows |= _site_rows(repeats=repeats)
    for chunks in (64, 256):
        rows |= _deep_rows(chunks, repeats=repeats)
    rows |= _decisions()
    return rows


def _ready(run: Callable[[], Any]) -> Callable[[], object]:
    return lambda: jax.block_until_ready(run())


# --- one site -----------------------------------------------------------------------------------

CALLS = 10
_WAYS: tuple[tuple[str, Implementation, int], ...] = (
    ("auto", "auto", 1),
    ("loops", "loops", 1),
    ("loops of 4", "loops", 4),
    ("loops of 16", "loops", 16),
    ("reference", "reference", 1),
)


def _site_rows(*, repeats: int) -> dict[str, Row]:
    """Forward and backward of one site, 16,384 x 4,096 bfloat16, 64 chunks of 64, R = 16."""
    source = np.random.default_rng(0)
    x, dy = (jnp.asarray(source.standard_normal((4 * ROWS, WIDTH)), jnp.bfloat16) for _ in range(2))
    samples: dict[str, list[float]] = {}
    for name, seeds in {"all": range(64), "4": range(0, 64, 16), "none": range(0)}.items():
        runners = {}
        for kind, implementation, at_once in _WAYS:
            growth = ef.Growth(
                sites=[ef.site("here", features=WIDTH, chunks=64)],
                blueprints={"bottleneck": ef.blueprints.bottleneck(16)},
                capacity=64,
                implementation=implementation,
                adapters_at_once=at_once,
            )
            state = with_live(growth, growth.init(jax.random.key(0)), list(seeds))

            def loss(x: Any, seeds: Any, dy: Any) -> jax.Array:
                return jnp.sum(seeds.grow("here", x) * dy, dtype=jnp.float32)

            def chain(x: Any, dy: Any, state: Any, growth: ef.Growth = growth) -> Any:
                def once(x: Any, _: None) -> Any:
                    _, (d_x, d_adapters), statistics = growth.value_and_grad(loss)(x, state, dy)
                    return x + 1e-3 * d_x, (d_adapters, statistics)

                return jax.lax.scan(once, x, None, length=CALLS)

            compiled = jax.jit(chain).lower(x, dy, state).compile()
            runners[f"{name} {kind}"] = _ready(partial(compiled, x, dy, state))

        def bare(x: Any, dy: Any) -> Any:
            return jax.lax.scan(lambda x, _: (x + 1e-3 * dy, None), x, None, length=CALLS)[0]

        still = jax.jit(bare).lower(x, dy).compile()
        runners[f"{name} bare"] = _ready(partial(still, x, dy))
        samples |= time_interleaved(runners, repeats=repeats, warmup=2)
    told = {"shape": "16384 x 4096", "dtype": "bfloat16", "chunks": 64, "rank": 16, "calls": CALLS}
    rows = {
        f"site_{name.replace(' ', '_')}": summarise([s / CALLS for s in seconds], "us", **told)
        for name, seconds in samples.items()
    }
    for name in ("all", "4", "none"):
        rows[f"site_{name}_loops_over_auto"] = ratio(
            samples[f"{name} loops"], samples[f"{name} auto"], **told
        )
    return rows


# --- a deep host ----------------------------------------------------------------------------------


def _deep_loss(weights: Any, seeds: Any, x: Any) -> jax.Array:
    def layer(h: Any, at: Any) -> Any:
        own, matrix = at
        return own.grow("deep", jax.nn.relu(h @ matrix)), None

    h, _ = jax.lax.scan(layer, x, (seeds.layers("deep"), weights))
    return jnp.mean(jnp.square(h.astype(jnp.float32)))


def _plain(weights: Any, x: Any) -> Any:
    grads = jax.grad(_deep_loss)(weights, ef.NoSeeds(), x)
    return optax.apply_updates(weights, jax.tree.map(lambda g: -1e-3 * g, grads))


def _deep_rows(chunks: int, *, repeats: int) -> dict[str, Row]:
    """One training step of 48 layers of 4,096 with a site after each, 4 live chunks a layer."""
    source = np.random.default_rng(0)
    weights = jnp.asarray(
        source.standard_normal((DEPTH, WIDTH, WIDTH), np.float32) * WIDTH**-0.5, jnp.bfloat16
    )
    x = jnp.asarray(source.standard_normal((ROWS, WIDTH)), jnp.bfloat16)
    growth = ef.Growth(
        sites=[ef.site("deep", features=WIDTH, chunks=chunks, layers=DEPTH)],
        blueprints={"bottleneck": ef.blueprints.bottleneck(16)},
        capacity=4,
        policy=policies.never(),
    )
    optimizer = ef.optim.per_adapter(optax.sgd(1e-3))
    live = [layer * chunks + at for layer in range(DEPTH) for at in range(4)]
    blank = growth.init(jax.random.key(0))
    states = {"dormant": blank, "live": with_live(growth, blank, live)}

    def step(weights: Any, state: Any, opt_state: Any, x: Any) -> Any:
        value, grads, statistics = growth.value_and_grad(_deep_loss)(weights, state, x)
        updates, opt_state = optimizer.update(
            grads, opt_state, (weights, state.adapters), slots=growth.slots(state)
        )
        weights, adapters = optax.apply_updates((weights, state.adapters), updates)
        state, _ = growth.update(state, adapters, statistics, value)
        return weights, state, opt_state

    opt_state = optimizer.init((weights, blank.adapters))
    grown = jax.jit(step).lower(weights, blank, opt_state, x).compile()
    bare = jax.jit(_plain).lower(weights, x).compile()
    runners = {
        name: _ready(partial(grown, weights, state, opt_state, x)) for name, state in states.items()
    } | {"bare": _ready(partial(bare, weights, x))}
    samples = time_interleaved(runners, repeats=repeats, warmup=2)
    told = {"seeds": growth.layout.num_seeds, "layers": DEPTH, "rows": ROWS, "width": WIDTH}
    label = f"deep_{growth.layout.num_seeds}_seeds"
    rows = {
        f"{label}_bare": summarise(samples["bare"], "ms", **told),
        f"{label}_dormant_over_bare": ratio(samples["dormant"], samples["bare"], **told),
        f"{label}_live_over_bare": ratio(samples["live"], samples["bare"], **told),
    }
    for name, program in {"grown": grown, "bare": bare}.items():
        analysis: Any = program.memory_analysis()
        mebibytes = analysis.temp_size_in_bytes / 2**20
        rows[f"{label}_temporaries_{name}"] = exact(mebibytes, "MiB", **told)
    return rows


# --- decisions ------------------------------------------------------------------------------------


def _decisions() -> dict[str, Row]:
    """Steps of the demo before the decisions of a CPU and of this GPU part."""
    job, loaded = jobs.get("digits"), data.load("digits")

    def run(device: Any) -> tuple[list[tuple[Any, ...]], float]:
        with jax.default_device(device):
            arm = jobs.prepare(job, loaded).run_growing(0)
        told = [(event["step"], event["seed"], event["to"], event["cause"]) for event in arm.events]
        return told, arm.accuracy

    decided, accuracy = run(jax.devices("cpu")[0])
    found, score = run(jax.devices()[0])
    parted = [min(a[0], b[0]) for a, b in zip(decided, found, strict=False) if a != b]
    if not parted and len(decided) != len(found):
        parted = [max(decided, found, key=len)[min(len(decided), len(found))][0]]
    agreed = parted[0] if parted else job.steps
    told = {"of": job.steps, "events": len(decided), "accuracy": score, "on_cpu": accuracy}
    return {"decisions_agree": exact(agreed, "steps", **told)}
