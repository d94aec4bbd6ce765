"""Holds the ready jobs: a data set, a host with a layer that is too narrow, what may grow there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from esper_fn import policies
from esper_fn._growth import Growth
from esper_fn.blueprints import Blueprint, bottleneck, bottleneck_conv
from esper_fn.demo import hosts
from esper_fn.demo.data import Dataset
from esper_fn.demo.hosts import Host, count_parameters
from esper_fn.errors import UnknownNameError


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a comparison on one data set needs.

    Attributes:
      data: name of the data set.
      host: makes the host.
      family: makes hosts of the same kind by size, none with a narrow layer: the static rivals.
      blueprints: what may grow.
      batch_size: examples a step.
      learning_rate: of AdamW, decayed to zero by a cosine.
      steps: default number of steps.
      germinations: adapters that may germinate in the whole run.
      capacity: adapters alive at once per bank.
      survey_examples: held-out examples of a survey.
    """

    data: str
    host: Callable[[Dataset], Host]
    family: Callable[[Dataset, int], Host]
    blueprints: Mapping[str, Blueprint]
    batch_size: int
    learning_rate: float
    steps: int
    germinations: int
    capacity: int
    survey_examples: int


def _shape(data: Dataset) -> tuple[int, int, int]:
    height, width, channels = data.input_shape
    return height, width, channels


_paired = partial(bottleneck, activation="gelu", birth="paired")

_JOBS = {
    job.data: job
    for job in (
        Job(
            data="digits",
            host=lambda d: hosts.mlp((64, 32, 2, 32, d.num_classes), spans=3, chunks=8),
            family=lambda d, size: hosts.mlp((64, size, size, size, d.num_classes)),
            blueprints={"bottleneck": _paired(width=8)},
            batch_size=64,
            learning_rate=3e-3,
            steps=1500,
            germinations=4,
            capacity=4,
            survey_examples=128,
        ),
        Job(
            data="mnist1d",
            host=lambda d: hosts.mlp((40, 64, 2, 64, d.num_classes), spans=3, chunks=8),
            family=lambda d, size: hosts.mlp((40, size, size, size, d.num_classes)),
            blueprints={"bottleneck": _paired(width=16)},
            batch_size=128,
            learning_rate=3e-3,
            steps=3000,
            germinations=4,
            capacity=4,
            survey_examples=256,
        ),
        Job(
            data="fashion-mnist",
            host=lambda d: hosts.conv(
                _shape(d), (8, 16), hidden=8, classes=d.num_classes, chunks=4
            ),
            family=lambda d, size: hosts.conv(
                _shape(d), (size, 2 * size), hidden=2 * size, classes=d.num_classes
            ),
            blueprints={
                "bottleneck_conv": bottleneck_conv(width=8),
                "bottleneck": bottleneck(width=8),
            },
            batch_size=64,
            learning_rate=2e-3,
            steps=1000,
            germinations=4,
            capacity=4,
            survey_examples=128,
        ),
        Job(
            data="shakespeare",
            host=lambda d: hosts.transformer(
                vocabulary=d.num_classes, length=d.input_shape[0], width=64, blocks=2, hidden=16
            ),
            family=lambda d, size: hosts.transformer(
                vocabulary=d.num_classes, length=d.input_shape[0], width=64, blocks=2, hidden=size
            ),
            blueprints={"bottleneck": bottleneck(width=16)},
            batch_size=16,
            learning_rate=2e-3,
            steps=1000,
            germinations=6,
            capacity=4,
            survey_examples=32,
        ),
    )
}

POLICIES = ("grow", "periodic", "plateau", "random", "never")


def names() -> tuple[str, ...]:
    """Names the data sets that have a job."""
    return tuple(_JOBS)


def get(data: str) -> Job:
    """Returns the job of a data set.

    Args:
      data: one of `names()`.

    Raises:
      UnknownNameError: no job has this data set.
    """
    if data not in _JOBS:
        raise UnknownNameError("data set", data, names(), "or run your own with `runtime.fit`")
    return _JOBS[data]


def make_policy(
    name: str, job: Job, *, steps: int, score: policies.Score = "potential"
) -> policies.Policy:
    """Makes a policy by name, sized for a run of `steps`.

    At most `job.germinations` adapters germinate. All but `grow`, which asks at once, begin to ask
    after a tenth of the run, one adapter at a time, and stop at two fifths of it.

    Raises:
      UnknownNameError: the name is none of `POLICIES`.
    """
    start, rest = max(1, steps // 10), max(1, steps // 40)
    if name == "grow":
        return policies.chain(policies.grow(score=score), policies.max_total(job.germinations))
    if name == "plateau":
        base = policies.plateau(patience=max(1, steps // 20), min_gain=0.5, score=score)
    elif name == "periodic":
        base = policies.periodic(every=rest, start=start, score=score)
    elif name == "random":
        base = policies.periodic(every=rest, start=start, score="random", name="random")
    elif name == "never":
        return policies.never()
    else:
        raise UnknownNameError("policy", name, POLICIES)
    return policies.chain(
        base,
        policies.cooldown(rest),
        policies.max_concurrent(job.germinations),
        policies.max_total(job.germinations),
        policies.stop_after(2 * steps // 5),
    )


def make_growth(job: Job, host: Host, policy: str | None, *, steps: int) -> Growth:
    """Makes the growing network of a job, with the defaults and a policy; None is the default."""
    return Growth(
        sites=host.sites,
        blueprints=job.blueprints,
        capacity=job.capacity,
        policy=None if policy is None else make_policy(policy, job, steps=steps),
    )


def static_host(job: Job, data: Dataset, count: int) -> Host:
    """Makes the static host of a job whose number of parameters is nearest to `count`.

    Args:
      job: gives the family of hosts.
      data: gives the shapes of inputs and targets.
      count: number of parameters to come near to.
    """

    def parameters(size: int) -> int:
        return count_parameters(job.family(data, size))

    size = 1 + bisect_left(range(1, 4096), count, key=parameters)  # the first that is large enough
    sizes = range(max(1, size - 1), size + 1)
    return job.family(data, min(sizes, key=lambda size: abs(parameters(size) - count)))
