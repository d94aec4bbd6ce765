"""Growing runs for the tests of resuming: in this process, or as a program of their own."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_fn as ef
from esper_fn import checkpoint, runtime
from esper_fn import policies as P  # noqa: N812 -- short in tables
from esper_fn.demo import data, hosts, jobs
from esper_fn.lifecycle import Stage

# Through every stage, the optional one too.
QUICK = ef.lifecycle.settings(
    train_first=True,
    min_steps={Stage.TRAINING: 5, Stage.STABILIZATION: 3, Stage.FINE_TUNING: 10},
    max_steps={Stage.TRAINING: 12, Stage.STABILIZATION: 8, Stage.FINE_TUNING: 40},
)


class Job(NamedTuple):
    """A run but for its length."""

    growth: ef.Growth
    loss_fn: Any
    optimizer: optax.GradientTransformationExtraArgs
    params: Any
    batches: Any
    survey_batch: Any
    program: Any
    survey_every: int = 5

    def fit(self, **options: Any) -> runtime.Fit:
        arguments = {
            "num_steps": 120,
            "key": jax.random.key(1),
            "survey_batch": self.survey_batch,
            "survey_every": self.survey_every,
            "segment_steps": 5,
            "program": self.program,
            **options,
        }
        names = {field.name for field in dataclasses.fields(runtime.FitOptions)} & arguments.keys()
        numbers = runtime.FitOptions(**{name: arguments.pop(name) for name in names})
        return runtime.fit(
            self.growth,
            self.loss_fn,
            self.optimizer,
            self.params,
            self.batches,
            options=numbers,
            **arguments,
        )


def _job(
    host: Any,
    batches: Any,
    blueprint: Any,
    capacity: int = 2,
    at_once: int | None = 1,
    **options: Any,
) -> Job:
    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        logits = host.apply(params, seeds, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    growth = ef.Growth(
        sites=host.sites,
        blueprints={"bottleneck": blueprint},
        capacity=capacity,
        policy=P.chain(
            P.periodic(every=10, start=10, **options), P.max_total(4), P.stop_after(200)
        ),
        graft=ef.grafting.linear(12),
        settings=QUICK,
        adapters_at_once=at_once,
    )
    optimizer = ef.optim.per_adapter(optax.adamw(1e-2))
    return Job(
        growth=growth,
        loss_fn=loss_fn,
        optimizer=optimizer,
        params=host.init(jax.random.key(0)),
        batches=batches,
        survey_batch=jax.tree.map(lambda leaf: leaf[0], batches(20, 1)),
        program=runtime.compile_fit(growth, loss_fn, optimizer, survey_every=5),
    )


def mlp(capacity: int = 2, spans: int = 1) -> Job:
    source = np.random.default_rng(0)
    inputs = source.normal(size=(1024, 6)).astype(np.float32)
    targets = (inputs[:, :4] ** 2).argmax(1).astype(np.int32)

    def batches(first: int, count: int) -> Any:
        rows = (np.arange(first, first + count)[:, None] * 32 + np.arange(32)) % 1024
        return inputs[rows], targets[rows]

    host = hosts.mlp((6, 8, 2, 4), spans=spans, chunks=2)
    # Places drawn at random: keys are part of what must come back.
    blueprint = ef.blueprints.bottleneck(4)
    return _job(host, batches, blueprint, capacity, None, score="random", name="random")


def transformer() -> Job:
    source = np.random.default_rng(0)
    text = np.zeros(5000, np.int32)  # each sign is the sum of the two before it, or any
    text[:] = source.integers(0, 11, 5000)
    for index in range(2, 5000):
        if source.random() < 0.9:
            text[index] = (text[index - 1] + text[index - 2]) % 11

    def batches(first: int, count: int) -> Any:
        starts = (np.arange(first, first + count)[:, None] * 40 + 5 * np.arange(8)) % 4900
        rows = starts[..., None] + np.arange(13)
        return text[rows[..., :-1]], text[rows[..., 1:]]

    host = hosts.transformer(vocabulary=11, length=12, width=16, blocks=2, hidden=4)
    return _job(host, batches, ef.blueprints.bottleneck(4))


def main_job() -> Job:
    """The grown arm of `esper grow --data digits --steps 300`."""
    made = jobs.prepare(jobs.get("digits"), data.load("digits"), steps=300)
    batches = runtime.array_batches(
        made.data.train_inputs,
        made.data.train_targets,
        batch_size=made.job.batch_size,
        num_steps=300,
        seed=0,
    )
    held_out = made.data.validation_inputs[:128], made.data.validation_targets[:128]
    return Job(
        growth=made.growth,
        loss_fn=jobs.make_loss(made.host),
        optimizer=made.optimizer,
        params=made.host.init(jax.random.key(0)),
        batches=batches,
        survey_batch=held_out,
        program=made.grow_program,
        survey_every=25,
    )


def digest(value: Any) -> str:
    """Of every bit of a value's leaves."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)  # noqa: PLW2901 -- the key's bits
        whole.update(np.asarray(leaf).tobytes())
    return whole.hexdigest()


def main(folder: str, num_steps: str, every: str, seconds: str) -> int:
    """Grows, sleeping after each segment, until it ends or is told to end."""
    job = mlp()

    def listen(segment: runtime.Segment) -> None:
        print("segment", segment.first_step, flush=True)
        time.sleep(float(seconds))

    with checkpoint.Writer(Path(folder)) as writer, runtime.termination() as is_stopping:
        done = job.fit(
            num_steps=int(num_steps),
            checkpoints=runtime.Checkpoints(writer=writer, every_steps=int(every)),
            should_stop=is_stopping,
            listener=listen,
        )
        saved = writer.last_acknowledged
    print("resumed", done.resumed_from, "done", done.num_steps, "saved", saved, flush=True)
    print("digest", digest((done.state, done.losses)), done.events, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
