"""What saving costs a training loop, beside plain Orbax and `torch.save` of the same bytes."""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import esper_fn as ef
from benchmarks._timing import Row, exact, ratio, summarise, time_interleaved
from esper_fn import checkpoint, policies, runtime
from esper_fn.checkpoint._files import num_disk_bytes
from esper_fn.demo import hosts

NUM_SEEDS = 10_000
WIDTH = 576
BATCH = 128


def measure(*, quick: bool) -> Mapping[str, Row]:
    """All rows; `quick` takes fewer samples."""
    saves = 3 if quick else 12
    folder = Path(tempfile.mkdtemp(prefix="esper-checkpoint-"))
    try:
        rows = _training(folder / "training", saves=saves)
        rows |= _whole_saves(folder / "whole", saves=saves)
        rows |= _unchanged(folder / "unchanged", saves=saves)
        rows |= _rings(repeats=12 if quick else 100)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _job(num_snapshots: int = 2) -> tuple[Any, Any, runtime.TrainState]:
    """10,000 seeds over a host of 2.7 million parameters: with Adam and two snapshots, 100 MB."""
    host = hosts.mlp((784, *(WIDTH,) * 8, 10), chunks=WIDTH)
    growth = ef.Growth(
        sites=[ef.site("many", features=NUM_SEEDS, chunks=NUM_SEEDS), *host.sites[:1]],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=64,
        policy=policies.chain(policies.plateau(patience=10**6), policies.budget(10**6)),
        adapters_at_once=None,
    )

    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        logits = host.apply(params["host"], cast(Any, _OneSite(seeds)), batch[0])
        wide = seeds.grow("many", jnp.tanh(params["wide"]))
        mean = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        return mean + 1e-3 * jnp.mean(jnp.square(wide))

    optimizer = ef.optim.per_adapter(optax.adam(1e-3))
    params = {
        "host": host.init(jax.random.key(0)),
        "wide": jax.random.normal(jax.random.key(1), (1, NUM_SEEDS)),
    }
    grown = growth.init(jax.random.key(2))
    state = runtime.init(optimizer, params, grown, num_snapshots=num_snapshots)
    step = runtime.make_step(growth, loss_fn, optimizer, survey_every=None)
    run = jax.jit(
        lambda state, batch: step(state, batch, None, growth.commands())[0], donate_argnums=0
    )
    return run, growth, state


class _OneSite:
    """The seeds of the first hidden layer; further layers stay plain."""

    def __init__(self, seeds: Any) -> None:
        self._seeds = seeds

    def grow(self, name: str, x: jax.Array, *, source: jax.Array | None = None) -> jax.Array:
        """The seed's output at `hidden1`, `x` elsewhere."""
        del source
        return self._seeds.grow(name, x) if name == "hidden1" else x


def _state_bytes(state: Any) -> int:
    return sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(state)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _batch() -> tuple[jax.Array, jax.Array]:
    source = np.random.default_rng(0)
    return (
        jnp.asarray(source.normal(size=(BATCH, 784)), jnp.float32),
        jnp.asarray(source.integers(0, 10, BATCH), jnp.int32),
    )


class _Loop:
    """A training loop that times its steps."""

    def __init__(self) -> None:
        self._run, _, self.state = _job()
        self._batch = _batch()

    def steps(self, count: int) -> list[float]:
        """Seconds of each of some steps."""
        return [_timed(self._step) for _ in range(count)]

    def _step(self) -> None:
        self.state = self._run(self.state, self._batch)
        self.state.growth_state.step.block_until_ready()


def _training(folder: Path, *, saves: int) -> dict[str, Row]:
    """The loop waits for the copy; the rest goes on beside it and takes its share of the cores."""
    loop = _Loop()
    loop.steps(5)
    labels = {
        "seeds": NUM_SEEDS,
        "state_bytes": _state_bytes(loop.state),
        "counted": "wall clock of one optimiser step, donated state",
    }
    quiet: list[float] = []
    stalls: list[float] = []
    busy: list[float] = []
    extra: list[float] = []
    with checkpoint.Writer(folder, keep=checkpoint.latest(2)) as writer:
        runtime.save_state(writer, 0, loop.state)
        writer.wait()
        for index in range(1, saves + 1):
            alone = loop.steps(12)
            quiet += alone
            stalls.append(_timed(partial(runtime.save_state, writer, index, loop.state)))
            during: list[float] = []
            while not writer.poll():
                during += loop.steps(1)
            busy += during
            usual = float(np.median(alone))
            extra.append(stalls[-1] + sum(during) - usual * len(during))
    usual = float(np.median(quiet))
    return {
        "step": summarise(quiet, "ms", **labels),
        "stall": summarise(stalls, "ms", counted="Writer.save until it returns"),
        "stall_in_steps": ratio(stalls, [usual] * len(stalls), counted="stall over a step"),
        "step_while_saving": summarise(busy, "ms", counted="steps beside the writing thread"),
        "save_in_steps": ratio(
            extra,
            [usual] * len(extra),
            counted="all time the loop lost to one save: stall and slower steps, in steps",
        ),
    }


def _rings(*, repeats: int) -> dict[str, Row]:
    """One optimiser step without snapshots and with rings of them, the writing of each included."""
    batch = _batch()

    def stepper(num_snapshots: int) -> Callable[[], object]:
        run, _, state = _job(num_snapshots)
        # A buffer of its own for every leaf: each step donates its state.
        state = jax.tree.map(jnp.copy, state)

        def step() -> None:
            nonlocal state
            state = run(state, batch)
            state.growth_state.step.block_until_ready()

        return step

    sizes = (0, 3, 8)
    samples = time_interleaved(
        {str(size): stepper(size) for size in sizes}, repeats=repeats, warmup=2
    )
    labels = {"counted": "one optimiser step, donated state", "every": 50, "seeds": NUM_SEEDS}
    return {
        f"ring_of_{size}_over_none": ratio(samples[str(size)], samples["0"], **labels)
        for size in sizes[1:]
    } | {"ring_of_8_over_3": ratio(samples["8"], samples["3"], **labels)}


def _arrays() -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    return {f"layer{i}": source.normal(size=(1 << 18,)).astype(np.float32) for i in range(100)}


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _whole_saves(folder: Path, *, saves: int) -> dict[str, Row]:
    """Until the bytes are in files, all arrays new: 105 MB."""
    folder.mkdir()
    times, blocked = _race(folder, saves)
    labels = {"bytes": sum(x.nbytes for x in _arrays().values())}
    restored = [_timed(lambda: checkpoint.restore(folder / "esper")) for _ in range(saves)]
    verified = [_timed(lambda: checkpoint.verify(folder / "esper")) for _ in range(saves)]
    rows = {
        f"save_105mb_{name}": summarise(taken, "ms", **labels, counted="save and wait")
        for name, taken in times.items()
    }
    rows |= {
        f"blocked_105mb_{name}": summarise(taken, "ms", **labels, counted="save until it returns")
        for name, taken in blocked.items()
    }
    rows["save_over_orbax"] = ratio(times["esper"], times["orbax"])
    rows["restore_105mb"] = summarise(restored, "ms", counted="verify every byte, read, compare")
    steps = len(checkpoint.steps(folder / "esper"))
    rows["verify_105mb"] = summarise([t / steps for t in verified], "ms", counted="one step")
    return rows


def _race(folder: Path, saves: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of whole saves, and until `save` returns, of Esper-fn, Orbax and torch in turn."""
    arrays = jax.tree.map(jnp.asarray, _arrays())
    torch = _torch()
    times: dict[str, list[float]] = {}
    blocked: dict[str, list[float]] = {}
    asynchronous = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    with checkpoint.Writer(folder / "esper", keep=checkpoint.latest(1)) as writer:
        for index in range(saves + 1):
            arrays = jax.tree.map(lambda x: x + 1, arrays)
            jax.block_until_ready(arrays)
            target = (folder / f"orbax{index}").absolute()
            request = ocp.args.PyTreeSave(arrays)
            stalls = {"esper": _timed(partial(writer.save, index, arrays))}
            rests = {"esper": _timed(writer.wait)}
            stalls["orbax"] = _timed(partial(asynchronous.save, target, args=request))
            rests["orbax"] = _timed(asynchronous.wait_until_finished)
            shutil.rmtree(target)
            if torch is not None:
                tensors = {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
                file = folder / f"torch{index}.pt"
                rests["torch_save"] = _timed(partial(torch.save, tensors, file))
                file.unlink()
            if index == 0:
                continue  # the first of each warms up
            for name, seconds in stalls.items():
                blocked.setdefault(name, []).append(seconds)
            for name, seconds in rests.items():
                times.setdefault(name, []).append(stalls.get(name, 0.0) + seconds)
    asynchronous.close()
    return times, blocked


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch


def _unchanged(folder: Path, *, saves: int) -> dict[str, Row]:
    """A frozen host of 105 MB and 4 MB that change: bytes on disk and time of a further save."""
    host = _arrays()
    source = np.random.default_rng(1)
    before, taken, written = 0, [], []
    with checkpoint.Writer(folder, keep=checkpoint.everything()) as writer:
        for index in range(min(saves, 8) + 1):
            changing = source.normal(size=(1 << 20,)).astype(np.float32)
            value = {"host": host, "adapters": {"changing": changing}}
            begun = time.perf_counter()
            writer.save(index, value, parts=("host", "adapters"))
            writer.wait()
            if index:
                taken.append(time.perf_counter() - begun)
            now = num_disk_bytes(folder)
            written.append(now - before)
            before = now
    buffer = io.BytesIO()
    np.save(buffer, changing)
    return {
        "save_105mb_unchanged": summarise(taken, "ms", counted="save and wait, host shared"),
        "bytes_unchanged_over_changed": exact(
            max(written[1:]) / len(buffer.getvalue()),
            "ratio",
            counted="bytes a further step adds over bytes that changed",
            first_step_bytes=written[0],
        ),
    }
