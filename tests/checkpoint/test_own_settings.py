"""A run goes on with its own settings, whatever they are made of; what cannot be saved is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_support import assert_same, fail
from flax import nnx

from esper_fn import checkpoint, runtime
from esper_fn.errors import CheckpointError, ResumeError

PARAMS = {"w": np.ones(3, np.float32)}


def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
    return ((params["w"] * batch) ** 2).mean()


def batches(first: int, count: int) -> Any:
    return np.ones((count, 3), np.float32) * (1 + np.arange(first, first + count)[:, None])


OPTIMIZER = optax.sgd(0.1)
PROGRAM = runtime.compile_fit_host(loss_fn, OPTIMIZER)


def train(folder: Path, num_steps: int, **options: Any) -> runtime.Fit:
    with checkpoint.Writer(folder, on_failure=fail) as writer:
        return runtime.fit_host(
            loss_fn, OPTIMIZER, PARAMS, batches, num_steps=num_steps, segment_steps=2,
            program=PROGRAM,
            checkpoints=runtime.Checkpoints(writer=writer, every_steps=2, **options),
        )  # fmt: skip


SETTINGS: dict[str, Any] = {
    "tuples": (1, (2.5, "a")),
    "keys": {1: "a", 2: {True: (), None: 0}, "x": 1},
    "infinite": [float("inf"), -np.inf],
    "nan": {"a": float("nan")},
    "numbers": {
        "a": np.float32(0.1),
        "b": np.int64(3),
        "c": np.bool_(True),
        "d": np.float64("nan"),
    },
    "arrays": [np.arange(3), jnp.float32(2)],
    "$money": {"$float": "x", "$items": 1},
    5: "a name that is no string",
}


def test_a_run_goes_on_with_its_own_settings(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 4, settings=SETTINGS)
    train(tmp_path / "run", 2, settings=SETTINGS)
    done = train(tmp_path / "run", 4, settings={**SETTINGS})
    assert done.resumed_from == 2
    assert_same((whole.state, whole.losses), (done.state, done.losses))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("tuples", (1, (2.5, "b"))),
        ("keys", {1: "a", 2: {True: (), None: 1}, "x": 1}),
        ("keys", {1: "a", "x": 1}),
        ("infinite", [float("inf"), np.inf]),
        ("nan", {"a": 0.0}),
        ("numbers", {**SETTINGS["numbers"], "a": np.float32(0.2)}),
        ("arrays", [np.arange(4), jnp.float32(2)]),
    ],
)
def test_other_settings_are_still_refused_by_name(tmp_path: Path, name: str, changed: Any) -> None:
    train(tmp_path, 2, settings=SETTINGS)
    with pytest.raises(ResumeError, match=f"{name} is .* now and was"):
        train(tmp_path, 4, settings={**SETTINGS, name: changed})


def test_a_note_comes_back_with_its_keys_and_numbers(tmp_path: Path) -> None:
    note = {1: np.float32(0.5), "best": float("-inf"), "row": (np.int8(1), np.arange(2)), "$": {}}
    notes: list[Any] = []
    train(tmp_path, 2, note=lambda: note)
    train(tmp_path, 4, note=lambda: note, recall=notes.append)
    assert notes == [{1: 0.5, "best": float("-inf"), "row": [1, [0, 1]], "$": {}}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"a": {"b": [object()]}}}, r"settings/a/b/0: a object .* cannot be saved"),
        ({"settings": {"path": Path("x")}}, "settings/path: a PosixPath"),
        ({"settings": {"key": jax.random.key(0)}}, "settings/key: an array without numbers"),
        ({"settings": {"long": 10**5000}}, "record: "),
        ({"note": lambda: {"rows": {1, 2}}}, "note/rows: a set"),
    ],
)
def test_what_cannot_be_saved_is_said_before_the_first_step(
    tmp_path: Path, options: Any, message: str
) -> None:
    with checkpoint.Writer(tmp_path) as writer:
        checkpoints = runtime.Checkpoints(writer=writer, **options)
        with pytest.raises(CheckpointError, match=message):
            runtime.fit_host(
                loss_fn, OPTIMIZER, PARAMS, lambda *_: pytest.fail("a step was taken"),
                num_steps=2, checkpoints=checkpoints,
            )  # fmt: skip


def test_a_state_that_cannot_be_saved_is_said_before_the_first_step(tmp_path: Path) -> None:
    deep: Any = np.ones(3, np.float32)
    for _ in range(105):
        deep = [deep]
    with checkpoint.Writer(tmp_path) as writer, pytest.raises(CheckpointError, match="deeper"):
        runtime.fit_host(
            loss_fn, OPTIMIZER, {"w": deep}, lambda *_: pytest.fail("a step was taken"),
            num_steps=2, checkpoints=runtime.Checkpoints(writer=writer),
        )  # fmt: skip


def test_a_note_that_needs_a_segment_first_is_no_obstacle(tmp_path: Path) -> None:
    rows: list[float] = []
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        runtime.fit_host(
            loss_fn, OPTIMIZER, PARAMS, batches, num_steps=4, segment_steps=2, program=PROGRAM,
            listener=lambda segment: rows.append(float(segment.losses[-1])),
            checkpoints=runtime.Checkpoints(
                writer=writer, every_steps=2, note=lambda: {"last": rows[-1]}
            ),
        )  # fmt: skip
    assert checkpoint.restore(tmp_path).record["note"] == {"last": rows[-1]}


def test_an_nnx_model_with_lists_trains_is_saved_and_goes_on(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
            self.adapter = nnx.Sequential(nnx.Linear(3, 1, rngs=rngs), nnx.relu)

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

    def loss(params: Any, seeds: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        for layer in model.layers:
            batch = layer(batch)
        return (model.adapter(batch) ** 2).mean()

    program = runtime.compile_fit_host(loss, OPTIMIZER)

    def run(folder: Path, num_steps: int) -> runtime.Fit:
        with checkpoint.Writer(folder, on_failure=fail) as writer:
            return runtime.fit_host(
                loss, OPTIMIZER, params, lambda *a: batches(*a) / 10, num_steps=num_steps,
                segment_steps=2, program=program,
                checkpoints=runtime.Checkpoints(writer=writer),
            )  # fmt: skip

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "run", 2)
    done = run(tmp_path / "run", 4)
    assert done.resumed_from == 2
    assert_same(whole.state, done.state)


def test_intervals_are_whole_numbers(tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path) as writer:
        every = np.int64(5)
        assert runtime.Checkpoints(writer=writer, every_steps=every).every_steps == 5  # type: ignore[arg-type]
        for wrong in (True, 2.0, "2", 0, None):
            with pytest.raises(ValueError, match="every_steps must be an int"):
                runtime.Checkpoints(writer=writer, every_steps=wrong)
