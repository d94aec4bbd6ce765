"""Does growth keep a network plastic on a stream that never stops changing?

Three streams (`benchmarks._streams`): *labels*, the same images with new random labels every 200
steps; *pixels*, Fashion-MNIST with newly permuted pixels every task; *regression*, the slowly
changing regression of Dohare et al. (Nature 632:768, 2024). On each the grown arm meets published
remedies (`benchmarks._plastic_rivals`) that have at least as many parameters as host and adapters
together, no remedy at that size (`plain`) and at the host's (`host`), and an oracle of that size
that starts anew at every task (`full_reset`).

The metric is taken on each batch before it is learned. Every arm's hyperparameters, learning rate
included, are those of the best last tenth over the selection seeds; the rows come from other seeds,
run once. A row is a mean over these seeds with its 95 % t-interval: of the whole stream (`all`), of
its last tenth, and of the paired differences. A scene says something only where the plain network
at its best learning rate loses plasticity: `STREAM_host_change`, its last tenth minus its first.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import esper_fn as ef
from benchmarks import _plastic_rivals as rivals
from benchmarks._plastic_grown import grown
from benchmarks._plastic_network import Arm, Hyper, make_arm, matched_widths
from benchmarks._records import BenchmarkError
from benchmarks._streams import Stream
from benchmarks._timing import Row
from benchmarks.growth import difference
from esper_fn import policies

SELECTION_SEEDS = (100, 101, 102)
FINAL_SEEDS = tuple(range(10))
SURVEY_EXAMPLES = 256
SURVEY_BINS = 3
"""Bins between two surveys: not a divisor of the ten bins of a task, which ought not to show."""

_RATES = {"adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "sgd": (1e-3, 3e-3, 1e-2, 3e-2)}
_HOST_RATES = {"adam": (3e-5, 1e-4, 3e-4, 1e-3), "sgd": (3e-4, 1e-3, 3e-3, 1e-2)}
"""Of a host that grows: adapters learn the quick part."""
_ADAPTER_RATES = {"adam": (1e-3, 3e-3, 1e-2, 3e-2), "sgd": (3e-3, 1e-2, 3e-2, 1e-1)}
_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
_REPLACEMENTS = (1e-5, 1e-4, 1e-3, 1e-2)


class Entry(NamedTuple):
    """An arm and the hyperparameters from which its own are chosen."""

    arm: Arm
    hypers: list[Hyper]


def measure(make_stream: Callable[[], Stream], *, quick: bool) -> Mapping[str, Row]:
    """Measures all rows of a stream.

    Args:
      make_stream: what all arms learn from.
      quick: take few seeds and few hyperparameters.

    Raises:
      BenchmarkError: the data of the stream are missing.
    """
    try:
        stream = make_stream()
    except ef.errors.MissingDataError as error:
        raise BenchmarkError(str(error)) from error
    contenders = entries(stream)
    if quick:
        contenders = [entry._replace(hypers=entry.hypers[:1]) for entry in contenders]
    return compare(
        stream,
        contenders,
        selection_seeds=SELECTION_SEEDS[:1] if quick else SELECTION_SEEDS,
        final_seeds=FINAL_SEEDS[:2] if quick else FINAL_SEEDS,
    )


# --- arms ----------------------------------------------------------------------------------------


def entries(stream: Stream) -> list[Entry]:
    """Lists the arms of a stream, all with Adam; those for numbers with SGD, as published.

    *grown* follows docs/how_to/streams.md: a slow host, quick adapters, `policies.recycle`.
    *grown_default* is `Growth` as it is when nothing is set.

    Args:
      stream: what they learn from.

    Returns:
      The grown arms first, then their rivals.
    """
    optimizer = "adam" if stream.unit == "%" else "sgd"
    rates = {"rate": _RATES[optimizer]}
    own_rates = {"rate": _HOST_RATES[optimizer], "adapter_rate": _ADAPTER_RATES[optimizer]}
    ours = grown(
        stream,
        optimizer=optimizer,
        policy=policies.chain(policies.periodic(every=10, count=64), policies.recycle()),
        options={
            "settings": ef.lifecycle.settings(embargo_steps=0),
            "governor": ef.governors.disabled(),
        },
    )
    default = grown(stream, name="grown_default", optimizer=optimizer)
    widths = matched_widths(stream.widths, ours.num_parameters)
    methods: dict[str, tuple[Any, dict[str, Sequence[float]]]] = {
        "plain": (rivals.plain(), {}),
        "l2": (rivals.plain(), {"l2": _DECAYS}),
        "shrink_perturb": (
            rivals.shrink_and_perturb(),
            {"shrink": (1e-5, 1e-4, 1e-3), "noise": (1e-3, 1e-2)},
        ),
        "redo": (rivals.redo(), {"dormant": (0.01, 0.1), "period": (200, 1000)}),
        "backprop": (rivals.continual_backprop(), {"replacement": _REPLACEMENTS}),
        "l2_backprop": (
            rivals.continual_backprop(),
            {"l2": _DECAYS[:3], "replacement": _REPLACEMENTS[1:]},
        ),
        "snr": (rivals.self_normalised_resets(), {"percentile": (0.9, 0.95, 0.98, 0.99)}),
        "full_reset": (rivals.full_reset(stream.task_steps), {}),
    }
    host = make_arm("host", stream, rivals.plain(), optimizer=optimizer)
    return [
        Entry(ours, grid(**own_rates)),
        Entry(default, grid(**own_rates)),
        Entry(host, grid(**rates)),
        *(
            Entry(
                make_arm(name, stream, method, optimizer=optimizer, widths=widths),
                grid(**rates, **own),
            )
            for name, (method, own) in methods.items()
        ),
    ]


def grid(**values: Sequence[float]) -> list[Hyper]:
    """Lists all combinations.

    >>> len(grid(rate=(1e-3, 1e-2), l2=(0.0, 1e-4, 1e-3)))
    6
    """
    return [
        Hyper(**dict(zip(values, row, strict=True))) for row in itertools.product(*values.values())
    ]


# --- running -------------------------------------------------------------------------------------


def play(
    stream: Stream, arm: Arm, hypers: Sequence[Hyper], seeds: Sequence[int], lanes: int = 128
) -> np.ndarray:
    """Runs an arm on a stream with all hyperparameters and all seeds, as one mapped program.

    A seed gives the same stream to every arm.

    Args:
      stream: what it learns from.
      arm: the learner.
      hypers: H of them.
      seeds: N of them.
      lanes: runs in one call at most; the runs of several calls share one program.

    Returns:
      The metric, `[H, N, bins]`.
    """
    run = jax.jit(jax.vmap(make_run(stream, arm), in_axes=(0, 0, None)))
    pairs = list(itertools.product(hypers, seeds))
    size = min(lanes, len(pairs))
    metrics = []
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        some += pairs[:1] * (size - len(some))  # every call has the same shape
        chosen = Hyper(
            *(
                jnp.asarray(column, jnp.float32)
                for column in zip(*(h for h, _ in some), strict=True)
            )
        )
        keys = jnp.stack([jax.random.key(seed) for _, seed in some])
        metrics.append(np.asarray(run(keys, chosen, stream.data)))
    return np.concatenate(metrics)[: len(pairs)].reshape(len(hypers), len(seeds), -1)


def make_run(stream: Stream, arm: Arm) -> Callable[[jax.Array, Hyper, Any], jax.Array]:
    """Makes `run(key, hyper, data)`, a whole stream as one program; returns the bins' metrics.

    A survey comes before every third bin, on the last batches that the arm has seen; before the
    first bin on its first batch. So no arm gets data that others do not get. Whether it is due
    depends on the step alone, so that under `vmap` the conditional stays one.

    Args:
      stream: what the arm learns from.
      arm: the learner.
    """
    num_bins = stream.num_steps // stream.bin_steps

    def run(key: jax.Array, hyper: Hyper, data: Any) -> jax.Array:
        world = stream.init(jax.random.fold_in(key, 0), data)

        def advance(state: Any, step: jax.Array) -> tuple[Any, jax.Array]:
            return arm.step(state, stream.batch(world, step), hyper)

        def survey(state: Any, first: jax.Array) -> Any:
            if arm.survey is None:
                return state
            return arm.survey(state, _last_batches(stream, world, first), hyper)

        def advance_bin(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
            first = index * stream.bin_steps
            is_due = index % SURVEY_BINS == 0
            state = jax.lax.cond(is_due, survey, lambda state, first: state, state, first)
            state, metrics = jax.lax.scan(advance, state, first + jnp.arange(stream.bin_steps))
            return state, jnp.mean(metrics)

        state = arm.init(jax.random.fold_in(key, 1), hyper)
        return jax.lax.scan(advance_bin, state, jnp.arange(num_bins))[1]

    return run


def _last_batches(stream: Stream, world: Any, step: jax.Array) -> Any:
    """The examples that came before a step, `SURVEY_EXAMPLES` of them."""
    rows = jax.eval_shape(stream.batch, world, step)[0].shape[0]
    count = max(SURVEY_EXAMPLES // rows, 1)
    steps = jnp.maximum(step - count + jnp.arange(count), 0)
    batches = jax.lax.map(lambda earlier: stream.batch(world, earlier), steps)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches)


# --- comparing -----------------------------------------------------------------------------------


def compare(
    stream: Stream,
    contenders: Sequence[Entry],
    *,
    selection_seeds: Sequence[int],
    final_seeds: Sequence[int],
) -> dict[str, Row]:
    """Chooses hyperparameters on some seeds, measures on others, and subtracts.

    Args:
      stream: what all arms learn from.
      contenders: the arms; the first is compared with each of the others.
      selection_seeds: for the choice.
      final_seeds: for the rows.
    """

    def run(entry: Entry) -> tuple[Hyper, np.ndarray]:
        arm, hypers = entry
        start = time.perf_counter()
        chosen = hypers[0]
        if len(hypers) > 1:
            chosen = hypers[best(stream, play(stream, arm, hypers, selection_seeds))]
        metrics = play(stream, arm, [chosen], final_seeds)[0]
        seconds = time.perf_counter() - start
        sys.stderr.write(f"{stream.name}, {arm.name}: {seconds:.0f} s, {chosen}\n")
        return chosen, metrics

    # One arm is compiled while others run.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        results = list(threads.map(run, contenders))
    rows: dict[str, Row] = {}
    first, ours = contenders[0].arm.name, last_tenth(results[0][1])
    for (arm, _), (chosen, metrics) in zip(contenders, results, strict=True):
        rows |= _arm_rows(stream, arm, chosen, metrics)
        if arm.name != first:
            rows[f"{stream.name}_{first}_minus_{arm.name}"] = _minus(
                stream, ours, last_tenth(metrics)
            )
    return rows


def best(stream: Stream, metrics: np.ndarray) -> int:
    """Returns the index of the hyperparameters with the best last tenth.

    Args:
      stream: says whether more is better.
      metrics: `[H, N, bins]`; hyperparameters with a metric that is not finite come last.
    """
    scores = last_tenth(metrics).mean(axis=-1)
    scores = scores if stream.unit == "%" else -scores
    return int(np.argmax(np.where(np.isfinite(scores), scores, -np.inf)))


def last_tenth(metrics: np.ndarray) -> np.ndarray:
    """Averages the last tenth of the bins: `[..., bins]` to `[...]`."""
    return metrics[..., -max(metrics.shape[-1] // 10, 1) :].mean(axis=-1)


def _arm_rows(stream: Stream, arm: Arm, hyper: Hyper, metrics: np.ndarray) -> dict[str, Row]:
    first = metrics[:, : max(metrics.shape[1] // 10, 1)].mean(axis=1)
    last = last_tenth(metrics)
    zeros = np.zeros_like(last)
    curve = metrics.mean(axis=0)
    curve = curve[: len(curve) // 20 * 20].reshape(-1, max(len(curve) // 20, 1)).mean(axis=1)
    details = {
        "hyper": {name: float(value) for name, value in hyper._asdict().items()},
        "parameters": arm.num_parameters,
        "curve": [round(float(value), 4) for value in curve],
    }
    name = f"{stream.name}_{arm.name}"
    overall = _minus(stream, metrics.mean(axis=1), zeros)
    return {
        f"{name}_all": dataclasses.replace(overall, extra={**overall.extra, **details}),
        f"{name}_last_tenth": _minus(stream, last, zeros),
        f"{name}_change": _minus(stream, last, first),
    }


def _minus(stream: Stream, ours: np.ndarray, theirs: np.ndarray) -> Row:
    unit = "points" if stream.unit == "%" else "squared error"
    return difference(ours.tolist(), theirs.tolist(), unit)
