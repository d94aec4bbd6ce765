"""One job, five arms, the same data in the same order: what growth is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_fn import optim, policies, runtime
from esper_fn._growth import Growth
from esper_fn._sites import NoSeeds
from esper_fn._typing import Array, Params
from esper_fn.demo.data import Dataset
from esper_fn.demo.hosts import Host, count_parameters
from esper_fn.demo.jobs._checkpoints import Keeping
from esper_fn.demo.jobs._jobs import Job, equal_parameters, make_growth, policy
from esper_fn.demo.jobs._progress import Listener, Teller
from esper_fn.lifecycle import Stage
from esper_fn.runtime._batches import Batches
from esper_fn.runtime._loop import segment_length

SURVEY_EVERY = 25
_SCORES: Mapping[str, policies.Score] = {"uniform": "even", "random": "random"}
EVAL_ROWS = 256


class Arm(NamedTuple):
    """A finished arm."""

    accuracy: float
    parameters: int
    train_flops: float
    num_compiled: int
    num_fossilized: int
    num_culled: int
    events: list[dict[str, Any]]
    rollbacks: list[dict[str, Any]]
    """See `runtime.Fit.rollbacks`."""


def loss_of(host: Host) -> Callable[..., Array]:
    """Mean cross-entropy of a host's logits: `loss_fn(params, seeds, (inputs, targets))`."""

    def loss_fn(params: Params, seeds: Any, batch: tuple[Array, Array]) -> Array:
        inputs, targets = batch
        logits = host.apply(params, seeds, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss_fn


def evaluator(host: Host, inputs: np.ndarray, targets: np.ndarray) -> Callable[..., Any]:
    """A compiled `(params, seeds) -> (accuracy, loss)` over all of `inputs`, in pieces."""
    rows = min(EVAL_ROWS, len(inputs))
    pad = -len(inputs) % rows
    order = np.concatenate([np.arange(len(inputs)), np.zeros(pad, np.int64)])
    weight = (np.arange(len(order)) < len(inputs)).astype(np.float32).reshape(-1, rows)
    pieces = (
        jnp.asarray(inputs[order].reshape(-1, rows, *inputs.shape[1:])),
        jnp.asarray(targets[order].reshape(-1, rows, *targets.shape[1:])),
        jnp.asarray(weight),
    )

    @jax.jit
    def evaluate(params: Params, seeds: Any, pieces: Any) -> tuple[Array, Array]:
        def one(piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            inputs, targets, weight = piece
            logits = host.apply(params, seeds, inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
            per_example = weight.reshape(-1, *(1,) * (targets.ndim - 1)) / np.prod(
                targets.shape[1:]
            )
            return jnp.sum(right * per_example), jnp.sum(losses * per_example)

        hits, lost = jax.lax.map(one, pieces)
        return jnp.sum(hits) / len(inputs), jnp.sum(lost) / len(inputs)

    return lambda params, seeds: jax.device_get(evaluate(params, seeds, pieces))


@dataclass(slots=True)
class Comparison:
    """A job made ready: compiled once, run with many seeds. Make one with `prepare`."""

    job: Job
    data: Dataset
    steps: int
    policy_name: str
    host: Host
    growth: Growth
    host_optimizer: optax.GradientTransformation
    optimizer: optax.GradientTransformationExtraArgs
    grow_segment: Any
    host_segment: Any
    evaluate: Any
    eval_every: int
    static: dict[int, tuple[Host, Any, Any]]
    keeping: Keeping | None = None
    """Saves every arm, and takes up what was saved."""
    steering: runtime.Steering | None = None
    """Steers the growing arm of the next run, and that one only, with a boundary at every step."""

    def grown(self, seed: int, listener: Listener | None = None, *, name: str = "grown") -> Arm:
        """The growing network; `uniform` spreads its places and `random` draws them."""
        key = jax.random.key(seed)
        start = self.growth.init(jax.random.fold_in(key, 1))
        if name != "grown" and self.policy_name != "never":
            twin = policy(self.policy_name, self.job, steps=self.steps, score=_SCORES[name])
            start = start._replace(policy=twin.init(self.growth.layout))
        host_count = count_parameters(self.host)
        tell = Teller(listener)
        steering = None
        if name == "grown":
            steering, self.steering = self.steering, None

        def listen(segment: runtime.Segment) -> None:
            infos, state = segment.infos, segment.state
            assert infos is not None  # noqa: S101 -- `fit` always gives them
            last = segment.first_step + segment.num_steps
            alpha, stage = infos.alpha[-1], infos.stage[-1]
            shown = np.flatnonzero((stage >= Stage.GERMINATED) & (stage <= Stage.FOSSILIZED))
            tell.segment(
                name,
                last,
                segment,
                self._score(last, lambda: (state.params, self.growth.seeds(state.growth))),
                host_count + int(infos.num_parameters[-1]),
                runtime.stage_counts(np.asarray(stage)),
                {str(seed): float(alpha[seed]) for seed in shown.tolist()},
            )

        fitted = self._kept(
            name,
            seed,
            tell,
            lambda **options: _steered(
                steering,
                self.growth,
                loss_of(self.host),
                self.optimizer,
                self.host.init(key),
                self._batches(seed),
                num_steps=self.steps,
                key=key,
                start=start,
                survey_batch=self._survey_batch(),
                options=runtime.FitOptions(
                    survey_every=SURVEY_EVERY,
                    segment_steps=self._segment_steps() if steering is None else 1,
                ),
                listener=listen,
                program=self.grow_segment,
                **options,
            ),
        )
        state = fitted.state
        stage = np.asarray(state.growth.seeds.stage)
        accuracy, _ = self.evaluate(state.params, self.growth.seeds(state.growth))
        surveyed = fitted.num_passes * self.host.flops + fitted.survey_flops
        trained = 3 * self.job.batch_size * (self.steps * self.host.flops + fitted.adapter_flops)
        return Arm(
            accuracy=float(accuracy),
            parameters=host_count + fitted.num_parameters,
            train_flops=float(trained + surveyed * self._num_surveyed()),
            num_compiled=fitted.num_compiled,
            num_fossilized=int((stage == Stage.FOSSILIZED).sum()),
            num_culled=sum(event["to"] == Stage.CULLED.name for event in fitted.events),
            events=fitted.events,
            rollbacks=fitted.rollbacks,
        )

    def plain(self, seed: int, listener: Listener | None = None) -> Arm:
        """The host without growth."""
        return self._fit_host("host", self.host, self.host_segment, self.evaluate, seed, listener)

    def equal(self, seed: int, count: int, listener: Listener | None = None) -> Arm:
        """A static network without a narrow place, with about `count` parameters."""
        host = equal_parameters(self.job, self.data, count)
        size = count_parameters(host)
        if size not in self.static:
            self.static[size] = (
                host,
                runtime.compile_fit_host(loss_of(host), self.host_optimizer),
                evaluator(host, self.data.test_inputs, self.data.test_targets),
            )
        host, segment, evaluate = self.static[size]
        return self._fit_host("static", host, segment, evaluate, seed, listener)

    # --- parts ---------------------------------------------------------------------------------

    def _fit_host(
        self,
        name: str,
        host: Host,
        segment: Any,
        evaluate: Any,
        seed: int,
        listener: Listener | None,
    ) -> Arm:
        count = count_parameters(host)
        tell = Teller(listener)

        def listen(done: runtime.Segment) -> None:
            last = done.first_step + done.num_steps
            scores = self._score(last, lambda: (done.state, NoSeeds()), evaluate)
            tell.segment(name, last, done, scores, count, None, None)

        fitted = self._kept(
            name,
            seed,
            tell,
            lambda **options: runtime.fit_host(
                loss_of(host),
                self.host_optimizer,
                host.init(jax.random.key(seed)),
                self._batches(seed),
                num_steps=self.steps,
                segment_steps=self._segment_steps(),
                listener=listen,
                program=segment,
                **options,
            ),
        )
        accuracy, _ = evaluate(fitted.state, NoSeeds())
        return Arm(
            accuracy=float(accuracy),
            parameters=count,
            train_flops=float(3 * self.job.batch_size * self.steps * host.flops),
            num_compiled=fitted.num_compiled,
            num_fossilized=0,
            num_culled=0,
            events=[],
            rollbacks=[],
        )

    def _kept(self, name: str, seed: int, tell: Teller, fit: Any) -> runtime.Fit:
        """The fit, saved and taken up where there is `keeping`."""
        if self.keeping is None:
            return fit()
        with self.keeping.arm(name, seed, tell.rows, tell.again) as checkpoints:
            fitted = fit(checkpoints=checkpoints, should_stop=self.keeping.should_stop)
            saved = checkpoints.writer.last_acknowledged
        self.keeping.check_done(name, fitted, self.steps, saved)
        return fitted

    def _batches(self, seed: int) -> Batches:
        return runtime.array_batches(
            self.data.train_inputs,
            self.data.train_targets,
            batch_size=self.job.batch_size,
            num_steps=self.steps,
            seed=seed,
        )

    def _num_surveyed(self) -> int:
        return min(self.job.survey_examples, len(self.data.validation_inputs))

    def _survey_batch(self) -> tuple[np.ndarray, np.ndarray]:
        count = self._num_surveyed()
        return self.data.validation_inputs[:count], self.data.validation_targets[:count]

    def _segment_steps(self) -> int:
        return min(25, self.eval_every)

    def _score(
        self, last: int, network: Callable[[], tuple[Any, Any]], evaluate: Any = None
    ) -> tuple[float, float] | None:
        is_first = last <= self._segment_steps()
        if last % self.eval_every and last != self.steps and not is_first:
            return None
        accuracy, loss = (evaluate or self.evaluate)(*network())
        return float(accuracy), float(loss)


def _steered(steering: runtime.Steering | None, *args: Any, **options: Any) -> runtime.Fit:
    """`fit`, on a bus where there is one."""
    if steering is None:
        return runtime.fit(*args, **options)
    with steering:
        fitted = runtime.fit(*args, **options, steering=steering)
    steering.check_stopped()
    return fitted


def prepare(
    job: Job,
    data: Dataset,
    *,
    steps: int | None = None,
    policy: str = "grow",
    keeping: Keeping | None = None,
) -> Comparison:
    """Makes a job ready to run.

    Args:
      job: from `jobs.job`.
      data: from `data.load`.
      steps: of every arm; the job's own number when left out.
      policy: one of `POLICIES`.
      keeping: saves every arm and takes up what was saved.

    Raises:
      UnknownNameError: no such policy.
      ValueError: fewer than 40 steps, in which nothing could pass its gates.
    """
    num_steps = job.steps if steps is None else steps
    if num_steps < 40:
        raise ValueError(
            f"steps must be at least 40, got {num_steps}: no seed could live that fast"
        )
    host = job.host(data)
    growing = make_growth(job, host, policy, steps=num_steps)
    schedule = optax.cosine_decay_schedule(job.learning_rate, num_steps)
    host_optimizer = optax.adamw(schedule)
    optimizer = optim.per_adapter(host_optimizer)
    return Comparison(
        job=job,
        data=data,
        steps=num_steps,
        policy_name=policy,
        host=host,
        growth=growing,
        host_optimizer=host_optimizer,
        optimizer=optimizer,
        grow_segment=runtime.compile_fit(
            growing, loss_of(host), optimizer, survey_every=SURVEY_EVERY
        ),
        host_segment=runtime.compile_fit_host(loss_of(host), host_optimizer),
        evaluate=evaluator(host, data.test_inputs, data.test_targets),
        eval_every=max(segment_length(num_steps, 25), num_steps // 20 // 25 * 25 or 1),
        static={},
        keeping=keeping,
    )


def run(
    comparison: Comparison,
    seed: int,
    listener: Listener | None = None,
    announce: Callable[[str], None] = lambda arm: None,
) -> dict[str, Any]:
    """All five arms with one seed: the rows of a summary.

    Args:
      comparison: from `prepare`.
      seed: of weights, order and places.
      listener: told after each segment of each arm.
      announce: told the name of each arm before it is compiled and run.

    Raises:
      StoppedError: with `keeping`, where that was asked to stop.
    """
    began = time.monotonic()
    taken_over = comparison.keeping.seconds_before if comparison.keeping else 0.0

    def before() -> float:
        return comparison.keeping.seconds_before - taken_over if comparison.keeping else 0.0

    announce("host")
    plain = comparison.plain(seed, listener)
    announce("grown")
    grown = comparison.grown(seed, listener)
    announce("uniform")
    uniform = comparison.grown(seed, listener, name="uniform")
    announce("random")
    random = comparison.grown(seed, listener, name="random")
    announce("static")
    static = comparison.equal(seed, grown.parameters, listener)
    arms: Mapping[str, Arm] = {
        "host": plain,
        "grown": grown,
        "uniform": uniform,
        "random": random,
        "static": static,
    }
    return {
        "seed": seed,
        "host_accuracy": plain.accuracy,
        "grown_accuracy": grown.accuracy,
        "static_equal_params_accuracy": static.accuracy,
        "uniform_growth_accuracy": uniform.accuracy,
        "random_growth_accuracy": random.accuracy,
        "host_params": plain.parameters,
        "grown_params": grown.parameters,
        "static_params": static.parameters,
        "uniform_params": uniform.parameters,
        "random_params": random.parameters,
        "seeds_total": comparison.growth.layout.num_seeds,
        "seeds_fossilized": grown.num_fossilized,
        "seeds_culled": grown.num_culled,
        "random_seeds_fossilized": random.num_fossilized,
        "random_seeds_culled": random.num_culled,
        "recompilations_after_first_step": sum(
            arm.num_compiled for arm in (grown, uniform, random)
        ),
        "train_flops": {name: arm.train_flops for name, arm in arms.items()},
        "rollbacks": {
            "grown": grown.rollbacks,
            "uniform": uniform.rollbacks,
            "random": random.rollbacks,
        },
        "wall_seconds": time.monotonic() - began + before(),
    }
