"""Does growth pay as it is shipped? Three scenes, each against its honest rivals.

- *digits*: `ef.Growth` with its defaults on the task of `make demo`, against a static network of
  as many parameters, paired by seed.
- *labels*: the same 1,200 images with new random labels every 200 steps, against the same network
  without growth. The default must not make Adam worse.
- *adapt*: a small character GPT, trained on one text, frozen, and adapted to another by low-rank
  adapters at every linear layer of its blocks (`torch_bridge.grow` alone), against PEFT's LoRA at
  the same layers with as many parameters and the same learning rates. Needs torch and PEFT.

Differences are means over paired seeds; `low` and `high` are their 95 % t-intervals.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_fn as ef
from benchmarks._timing import Row, exact
from esper_fn import runtime
from esper_fn.demo import hosts, jobs
from esper_fn.demo.data import load as load_data
from esper_fn.demo.jobs import mean_interval


def measure(*, quick: bool) -> Mapping[str, Row]:
    """Measures all rows; `quick` takes few seeds and short runs."""
    rows = _digits(num_seeds=2 if quick else 10, steps=100 if quick else 1500)
    rows |= _labels(num_seeds=2 if quick else 5, num_tasks=2 if quick else 30)
    if importlib.util.find_spec("peft") is None:
        sys.stderr.write("growth: the scene of adapting needs torch and PEFT; left out\n")
        return rows
    from benchmarks import _adapt

    return rows | _adapt.rows(num_seeds=1 if quick else 3, steps=20 if quick else 400)


def difference(ours: list[float], theirs: list[float], unit: str, **extra: object) -> Row:
    """Takes the mean of `ours - theirs`, paired, with its 95 % interval."""
    interval = mean_interval(np.subtract(ours, theirs))
    return Row(
        median=interval["mean"],
        low=interval["low"],
        high=interval["high"],
        unit=unit,
        count=len(ours),
        extra={"statistic": "mean and 95 % t-interval", "ours": ours, "theirs": theirs, **extra},
    )


# --- the demonstration's task --------------------------------------------------------------------


def _digits(*, num_seeds: int, steps: int) -> dict[str, Row]:
    # Growth as it is shipped: no policy is named.
    comparison = jobs.prepare(jobs.get("digits"), load_data("digits"), steps=steps, policy=None)
    grown, static, sizes = [], [], []
    for seed in range(num_seeds):
        ours = comparison.run_growing(seed)
        theirs = comparison.run_static(seed, ours.parameters)
        grown.append(100 * ours.accuracy)
        static.append(100 * theirs.accuracy)
        sizes.append(theirs.parameters)
    return {
        "digits_default_minus_static": difference(grown, static, "points", parameters=sizes),
    }


# --- random labels -------------------------------------------------------------------------------

_IMAGES, _WIDTH, _TASK_STEPS, _BATCH, _RATE = 1200, 100, 200, 64, 1e-3


def _labels(*, num_seeds: int, num_tasks: int) -> dict[str, Row]:
    try:
        data = load_data("fashion-mnist")
    except ef.errors.MissingDataError:
        data = load_data("digits")
    images = jnp.asarray(data.train_inputs[:_IMAGES].reshape(_IMAGES, -1), jnp.float32)
    widths = (images.shape[1], _WIDTH, _WIDTH, _WIDTH, 10)
    host = hosts.mlp(widths, spans=2)
    loss_fn = jobs.make_loss(host)
    growth = ef.Growth(
        sites=host.sites,
        blueprints={"bottleneck": ef.blueprints.bottleneck(width=16, activation="gelu")},
        capacity=1,
    )
    optimizer = ef.optim.per_adapter(optax.adam(_RATE))
    step = runtime.make_step(growth, loss_fn, optimizer, survey_every=None)
    grow = jax.jit(
        runtime.scan_steps(
            step, survey=runtime.make_survey(growth, loss_fn), survey_every=jobs.SURVEY_EVERY
        )
    )
    plain_step = runtime.compile_fit_host(loss_fn, optax.adam(_RATE))

    @jax.jit
    def accuracy(params: Any, seeds: Any, labels: jax.Array) -> jax.Array:
        chosen = jnp.argmax(host.apply(params, seeds, images), axis=-1)
        return jnp.mean((chosen == labels).astype(jnp.float32))

    ours: list[float] = []
    theirs: list[float] = []
    for seed in range(num_seeds):
        key = jax.random.key(seed)
        params = host.init(key)
        state = runtime.init(optimizer, params, growth.init(jax.random.fold_in(key, 1)))
        plain = (host.init(key), optax.adam(_RATE).init(params))
        random = np.random.default_rng(seed)
        scores: tuple[list[float], list[float]] = ([], [])
        for _ in range(num_tasks):
            labels = jnp.asarray(random.integers(0, 10, _IMAGES))
            rows = np.stack(
                [random.choice(_IMAGES, _BATCH, replace=False) for _ in range(_TASK_STEPS)]
            )
            batches = images[rows], labels[rows]
            state, _ = grow(state, batches, (images[:256], labels[:256]))
            plain, _ = plain_step(plain, batches)
            scores[0].append(
                float(accuracy(state.params, growth.seeds(state.growth_state), labels))
            )
            scores[1].append(float(accuracy(plain[0], ef.NoSeeds(), labels)))
        ours.append(100 * float(np.mean(scores[0])))
        theirs.append(100 * float(np.mean(scores[1])))
    conditions = {"tasks": num_tasks, "data": data.name}
    gain = difference(ours, theirs, "points", **conditions)
    return {
        "labels_default_minus_plain": gain,
        "labels_default_at_best": exact(gain.high, "points", **conditions),
    }
