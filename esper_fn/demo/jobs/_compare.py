"""Compares growth with its rivals: one job, five arms, the same data in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from esper_fn import optim, policies, runtime
from esper_fn._growth import Growth
from esper_fn._sites import NoSeeds
from esper_fn.demo.data import Dataset
from esper_fn.demo.hosts import Host, count_parameters
from esper_fn.demo.jobs._checkpoints import ArmCheckpoints
from esper_fn.demo.jobs._evaluate import Evaluate, make_evaluate, make_loss
from esper_fn.demo.jobs._jobs import Job, make_growth, make_policy, static_host
from esper_fn.demo.jobs._progress import Listener, ProgressLog
from esper_fn.lifecycle import Stage
from esper_fn.report._words import ACCURACY_KEY, GROWING_ARMS, PARAMS_KEY
from esper_fn.runtime._batches import Batches
from esper_fn.runtime._loop import segment_length

SURVEY_EVERY = 25
_SCORES: Mapping[str, policies.Score] = {"uniform": "even", "random": "random"}


class ArmResult(NamedTuple):
    """The outcome of an arm."""

    accuracy: float
    """Fraction of the test targets that the trained network predicts."""
    parameters: int
    train_flops: float
    num_compiled: int
    """Programs compiled after the first segment."""
    num_fossilized: int
    num_culled: int
    events: list[dict[str, Any]]
    rollbacks: list[dict[str, Any]]
    """See `runtime.Fit.rollbacks`."""


class _Network(NamedTuple):
    """A host with the compiled programs that train and evaluate it without growth."""

    host: Host
    program: Any
    evaluate: Evaluate


@dataclass(slots=True)
class Comparison:
    """A job that is ready to run with many seeds, from `prepare`; every program compiles once.

    Attributes:
      job: the job.
      data: its data set.
      steps: training steps of every arm.
      policy_name: name of the policy, None for the default of `Growth`.
      growth: the growing network.
      optimizer: of the growing network.
      grow_program: from `runtime.compile_fit`.
      checkpoints: save every arm and resume what was saved, if given.
      steering: steers the growing arm of the next run, and that one only, step by step.
    """

    job: Job
    data: Dataset
    steps: int
    policy_name: str | None
    growth: Growth
    optimizer: optax.GradientTransformationExtraArgs
    grow_program: Any
    checkpoints: ArmCheckpoints | None
    _host_optimizer: optax.GradientTransformation
    _network: _Network
    steering: runtime.Steering | None = None
    _static: dict[int, _Network] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        """The host that grows."""
        return self._network.host

    def run_growing(
        self, seed: int, listener: Listener | None = None, *, arm: str = "grown"
    ) -> ArmResult:
        """Runs the growing network.

        Args:
          seed: of weights, order and growth.
          listener: called after each segment.
          arm: `grown` grows where the survey says, `uniform` in every layer alike, `random` at
            random sites.
        """
        key = jax.random.key(seed)
        start = self.growth.init(jax.random.fold_in(key, 1))
        if arm != "grown" and self.policy_name not in {None, "never"}:
            twin = make_policy(self.policy_name, self.job, steps=self.steps, score=_SCORES[arm])
            start = start._replace(policy=twin.init(self.growth.layout))
        host_parameters = count_parameters(self.host)
        log = ProgressLog(listener)
        steering = None
        if arm == "grown":
            steering, self.steering = self.steering, None

        def listen(segment: runtime.Segment) -> None:
            scores, state = None, segment.state
            if self._is_scored(segment):
                seeds = self.growth.seeds(state.growth_state)
                scores = self._network.evaluate(state.params, seeds)
            log.record(arm, segment, host_parameters, scores)

        segment_steps = self._segment_steps() if steering is None else 1
        fit = partial(
            _fit_steered,
            steering,
            self.growth,
            make_loss(self.host),
            self.optimizer,
            self.host.init(key),
            self._batches(seed),
            num_steps=self.steps,
            key=key,
            start=start,
            survey_batch=self._survey_batch(),
            options=runtime.FitOptions(survey_every=SURVEY_EVERY, segment_steps=segment_steps),
            listener=listen,
            program=self.grow_program,
        )
        return self._grown_result(self._fit(arm, seed, log, fit))

    def run_host(self, seed: int, listener: Listener | None = None) -> ArmResult:
        """Runs the host without growth.

        Args:
          seed: of weights and order.
          listener: called after each segment.
        """
        return self._run_static("host", self._network, seed, listener)

    def run_static(self, seed: int, count: int, listener: Listener | None = None) -> ArmResult:
        """Runs a static network without a narrow layer.

        Args:
          seed: of weights and order.
          count: number of parameters to come near to.
          listener: called after each segment.
        """
        host = static_host(self.job, self.data, count)
        size = count_parameters(host)
        if size not in self._static:
            self._static[size] = _compile(host, self._host_optimizer, self.data)
        return self._run_static("static", self._static[size], seed, listener)

    # --- parts ---------------------------------------------------------------------------------

    def _grown_result(self, fitted: runtime.Fit) -> ArmResult:
        host, state = self.host, fitted.state
        stage = np.asarray(state.growth_state.seeds.stage)
        accuracy, _ = self._network.evaluate(state.params, self.growth.seeds(state.growth_state))
        surveyed = fitted.num_passes * host.flops + fitted.survey_flops
        trained = 3 * self.job.batch_size * (self.steps * host.flops + fitted.adapter_flops)
        return ArmResult(
            accuracy=accuracy,
            parameters=count_parameters(host) + fitted.num_parameters,
            train_flops=float(trained + surveyed * len(self._survey_batch()[0])),
            num_compiled=fitted.num_compiled,
            num_fossilized=int((stage == Stage.FOSSILIZED).sum()),
            num_culled=sum(event["to"] == Stage.CULLED.name for event in fitted.events),
            events=fitted.events,
            rollbacks=fitted.rollbacks,
        )

    def _run_static(
        self, arm: str, network: _Network, seed: int, listener: Listener | None
    ) -> ArmResult:
        host = network.host
        count = count_parameters(host)
        log = ProgressLog(listener)

        def listen(segment: runtime.Segment) -> None:
            is_scored = self._is_scored(segment)
            scores = network.evaluate(segment.state, NoSeeds()) if is_scored else None
            log.record(arm, segment, count, scores)

        fit = partial(
            runtime.fit_host,
            make_loss(host),
            self._host_optimizer,
            host.init(jax.random.key(seed)),
            self._batches(seed),
            num_steps=self.steps,
            segment_steps=self._segment_steps(),
            listener=listen,
            program=network.program,
        )
        fitted = self._fit(arm, seed, log, fit)
        accuracy, _ = network.evaluate(fitted.state, NoSeeds())
        flops = float(3 * self.job.batch_size * self.steps * host.flops)
        return ArmResult(accuracy, count, flops, fitted.num_compiled, 0, 0, [], [])

    def _fit(
        self, arm: str, seed: int, log: ProgressLog, fit: Callable[..., runtime.Fit]
    ) -> runtime.Fit:
        if self.checkpoints is None:
            return fit()
        return self.checkpoints.fit(arm, seed, log, self.steps, fit)

    def _batches(self, seed: int) -> Batches:
        return runtime.array_batches(
            self.data.train_inputs,
            self.data.train_targets,
            batch_size=self.job.batch_size,
            num_steps=self.steps,
            seed=seed,
        )

    def _survey_batch(self) -> tuple[np.ndarray, np.ndarray]:
        count = self.job.survey_examples
        return self.data.validation_inputs[:count], self.data.validation_targets[:count]

    def _eval_every(self) -> int:
        return max(segment_length(self.steps, 25), self.steps // 20 // 25 * 25 or 1)

    def _segment_steps(self) -> int:
        return min(25, self._eval_every())

    def _is_scored(self, segment: runtime.Segment) -> bool:
        """Tells whether a segment ends with an evaluation: the first, the last, and some more."""
        last = segment.first_step + segment.num_steps
        is_end = last <= self._segment_steps() or last == self.steps
        return is_end or last % self._eval_every() == 0


def _fit_steered(steering: runtime.Steering | None, *args: Any, **options: Any) -> runtime.Fit:
    """Runs `fit`, on a bus where there is one."""
    if steering is None:
        return runtime.fit(*args, **options)
    with steering:
        fitted = runtime.fit(*args, **options, steering=steering)
    steering.check_stopped()
    return fitted


def _compile(host: Host, optimizer: optax.GradientTransformation, data: Dataset) -> _Network:
    program = runtime.compile_fit_host(make_loss(host), optimizer)
    return _Network(host, program, make_evaluate(host, data.test_inputs, data.test_targets))


def prepare(
    job: Job,
    data: Dataset,
    *,
    steps: int | None = None,
    policy: str | None = "grow",
    checkpoints: ArmCheckpoints | None = None,
) -> Comparison:
    """Makes a job ready to run.

    Args:
      job: from `jobs.get`.
      data: from `data.load`.
      steps: training steps of every arm; those of the job by default.
      policy: one of `POLICIES`; None for the default policy of `Growth`.
      checkpoints: save every arm and resume what was saved.

    Returns:
      The comparison, which `run` runs with a seed.

    Raises:
      UnknownNameError: no policy has this name.
      ValueError: there are fewer than 40 steps, too few for a seed to pass its gates.
    """
    num_steps = job.steps if steps is None else steps
    if num_steps < 40:
        raise ValueError(
            f"steps must be at least 40, got {num_steps}: no seed could live that fast"
        )
    host = job.host(data)
    growth = make_growth(job, host, policy, steps=num_steps)
    schedule = optax.cosine_decay_schedule(job.learning_rate, num_steps)
    host_optimizer = optax.adamw(schedule)
    optimizer = optim.per_adapter(host_optimizer)
    loss_fn = make_loss(host)
    return Comparison(
        job=job,
        data=data,
        steps=num_steps,
        policy_name=policy,
        growth=growth,
        optimizer=optimizer,
        grow_program=runtime.compile_fit(growth, loss_fn, optimizer, survey_every=SURVEY_EVERY),
        checkpoints=checkpoints,
        _host_optimizer=host_optimizer,
        _network=_compile(host, host_optimizer, data),
    )


def run(
    comparison: Comparison,
    seed: int,
    listener: Listener | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs all five arms with one seed.

    Args:
      comparison: from `prepare`.
      seed: of weights, order and growth.
      listener: called after each segment of each arm.
      announce: called with the name of each arm before it is compiled and run.

    Returns:
      A row for `summarize`.

    Raises:
      StoppedError: `checkpoints.should_stop` of the comparison ended the run.
    """
    start, checkpoints = time.monotonic(), comparison.checkpoints
    earlier = checkpoints.earlier_seconds if checkpoints else 0.0
    arms: dict[str, ArmResult] = {}
    for arm in ACCURACY_KEY:
        if announce is not None:
            announce(arm)
        if arm == "host":
            arms[arm] = comparison.run_host(seed, listener)
        elif arm == "static":
            arms[arm] = comparison.run_static(seed, arms["grown"].parameters, listener)
        else:
            arms[arm] = comparison.run_growing(seed, listener, arm=arm)
    seconds = time.monotonic() - start
    if checkpoints:
        seconds += checkpoints.earlier_seconds - earlier
    grown, random = arms["grown"], arms["random"]
    return {
        "seed": seed,
        **{ACCURACY_KEY[arm]: result.accuracy for arm, result in arms.items()},
        **{PARAMS_KEY[arm]: result.parameters for arm, result in arms.items()},
        "seeds_total": comparison.growth.layout.num_seeds,
        "seeds_fossilized": grown.num_fossilized,
        "seeds_culled": grown.num_culled,
        "random_seeds_fossilized": random.num_fossilized,
        "random_seeds_culled": random.num_culled,
        "recompilations_after_first_step": sum(arms[arm].num_compiled for arm in GROWING_ARMS),
        "train_flops": {arm: result.train_flops for arm, result in arms.items()},
        "rollbacks": {arm: arms[arm].rollbacks for arm in GROWING_ARMS},
        "wall_seconds": seconds,
    }
