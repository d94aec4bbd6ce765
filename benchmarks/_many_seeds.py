"""A hundred thousand seeds on a transformer host in the main loop; prints figures for a benchmark.

`python -m benchmarks._many_seeds STEPS` prints the number of seeds, the process's peak memory in
bytes, and the seconds of each step after the first.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import jax
import numpy as np
import optax

import esper_fn as ef
from esper_fn import policies, runtime
from esper_fn.demo import hosts

LENGTH, VOCABULARY, BATCH = 16, 64, 2


def run(steps: int) -> tuple[int, list[float], runtime.Fit]:
    """Trains and grows for `steps`; returns the seeds, seconds a step, and the finished run."""
    host = hosts.transformer(
        vocabulary=VOCABULARY, length=LENGTH, width=64, blocks=24, hidden=4200, chunks=4200
    )
    growth = ef.Growth(
        sites=host.sites,
        blueprints={"scale_shift": ef.blueprints.scale_shift()},
        capacity=8,
        policy=policies.chain(policies.periodic(every=2, count=8), policies.max_concurrent(32)),
        adapters_at_once=1,
        max_ablations=2,
    )

    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        logits = host.apply(params, seeds, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    source = np.random.default_rng(0)

    def batches(first: int, count: int) -> Any:
        del first
        tokens = source.integers(0, VOCABULARY, (count, BATCH, LENGTH + 1)).astype(np.int32)
        return tokens[..., :-1], tokens[..., 1:]

    stamps: list[float] = []
    fitted = runtime.fit(
        growth,
        loss_fn,
        ef.optim.per_adapter(optax.sgd(1e-2)),
        host.init(jax.random.key(0)),
        batches,
        num_steps=steps,
        key=jax.random.key(1),
        survey_batch=tuple(leaf[0] for leaf in batches(0, 1)),
        options=runtime.FitOptions(survey_every=4, snapshot_every=None, segment_steps=1),
        listener=lambda _: stamps.append(time.perf_counter()),
    )
    return growth.layout.num_seeds, np.diff(stamps).tolist(), fitted


if __name__ == "__main__":
    seeds, seconds, _ = run(int(sys.argv[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(seeds, peak, *seconds)
