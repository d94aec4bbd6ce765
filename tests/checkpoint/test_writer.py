"""Writing, listing, verifying, restoring: whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_support import assert_same, fail, files_of, flip, step_folder, value

from esper_fn import checkpoint
from esper_fn.checkpoint import _orbax, _store
from esper_fn.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError

KEY = b"0123456789abcdef"


def test_a_value_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, value(big=300_000), record={"note": ["é", 1.5, None]})
    restored = checkpoint.restore(tmp_path)
    assert restored.step == 5
    assert restored.record == {"note": ["é", 1.5, None]}
    assert restored.passed_over == ()
    assert_same(value(big=300_000), restored.value)


def test_a_fresh_process_needs_no_template(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"a": jnp.arange(3), "key": jax.random.key(4)})
    program = """
        import sys, jax
        from esper_fn import checkpoint
        value = checkpoint.restore(sys.argv[1]).value
        print(value["a"].tolist(), jax.random.key_data(value["key"]).tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "[0, 1, 2] [0, 4]"


def test_part_of_a_value(tmp_path: Path) -> None:
    whole = value(big=300_000)
    checkpoint.save(tmp_path, 1, whole)
    assert_same(whole["numbers"], checkpoint.restore(tmp_path, only="numbers").value)
    assert_same(whole["params"][0]["w"], checkpoint.restore(tmp_path, only="params/0/w").value)
    assert checkpoint.restore(tmp_path, only="pair/right").value == (None, 3)
    with pytest.raises(CheckpointError, match="no 'nothing' there; it has nan, payload"):
        checkpoint.restore(tmp_path, only="numbers/nothing")


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    run = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = jnp.zeros((1 << 20,))
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        for step in range(3):
            state = run(state)
            writer.save(step, {"state": state})
    for step in range(3):
        saved = checkpoint.restore(tmp_path, step).value["state"]
        assert np.unique(saved).tolist() == [step + 1]


def test_unchanged_parts_are_not_written_twice(tmp_path: Path) -> None:
    host = np.random.default_rng(0).normal(size=(1 << 19,)).astype(np.float32)
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        for step in range(3):
            tree = {"host": host, "copy": {"host": host}, "rest": np.full(3, step)}
            writer.save(step, tree, parts=("host", "copy"))
    one_copy = host.nbytes + 300_000
    assert host.nbytes < used(tmp_path) < one_copy
    for step in range(3):
        np.testing.assert_array_equal(checkpoint.restore(tmp_path, step).value["host"], host)
    checkpoint.prune(tmp_path, checkpoint.latest(1))
    np.testing.assert_array_equal(checkpoint.restore(tmp_path).value["copy"]["host"], host)


def used(folder: Path) -> int:
    inodes = {file.stat().st_ino: file.stat().st_size for file in files_of(folder)}
    return sum(inodes.values())


def test_sharing_is_bounded_and_damage_is_not_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "MAX_SHARED", 2)
    host = np.random.default_rng(0).normal(size=(1 << 19,)).astype(np.float32)
    keep = checkpoint.everything()
    with checkpoint.Writer(tmp_path, keep=keep, on_failure=fail) as writer:
        for step in range(4):
            writer.save(step, {"host": host}, parts=("host",))
    assert 2 * host.nbytes < used(tmp_path) < 2 * host.nbytes + 500_000

    largest = max(files_of(step_folder(tmp_path, 3)), key=lambda file: file.stat().st_size)
    with checkpoint.Writer(tmp_path, keep=keep, on_failure=fail) as writer:
        monkeypatch.setattr(_store, "MAX_SHARED", 9)
        flip(largest, 1000)
        writer.save(4, {"host": host}, parts=("host",))
    assert [step for step, bad in checkpoint.verify(tmp_path).items() if bad] == [2, 3]


def test_where_links_are_impossible_parts_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    host = np.ones(1 << 19, np.float32)
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        writer.save(0, {"host": host}, parts=("host",))
        writer.save(1, {"host": host}, parts=("host",))
    assert list(checkpoint.verify(tmp_path).values()) == [None, None]
    np.testing.assert_array_equal(checkpoint.restore(tmp_path).value["host"], host)


def test_steps_are_collected_but_never_the_last_two_good_ones(tmp_path: Path) -> None:
    keep = checkpoint.best(1, "loss")
    with checkpoint.Writer(tmp_path, keep=keep, on_failure=fail) as writer:
        for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 5.0]):
            writer.save(step, {"x": np.full(2, step)}, metrics={"loss": loss})
            writer.wait()
            assert {step, max(0, step - 1)} <= set(checkpoint.steps(tmp_path))
    assert checkpoint.steps(tmp_path) == [1, 3, 4]


def test_prune_dry_run_says_and_does_nothing(tmp_path: Path) -> None:
    for step in range(4):
        checkpoint.save(tmp_path, step, {"x": np.full(2, step)})
    decisions = checkpoint.prune(tmp_path, checkpoint.every(2), dry_run=True)
    assert [(decision.step, decision.is_kept, decision.why) for decision in decisions] == [
        (0, True, "a multiple of 2"),
        (1, False, "not kept by every(2)"),
        (2, True, "a multiple of 2"),
        (3, True, "the newest sound step"),
    ]
    assert checkpoint.steps(tmp_path) == [0, 1, 2, 3]
    assert checkpoint.prune(tmp_path, checkpoint.every(2)) == decisions
    assert checkpoint.steps(tmp_path) == [0, 2, 3]


def test_one_writer_a_folder(tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        writer.save(1, {"x": np.ones(1)})
        with pytest.raises(CheckpointError, match="another process is writing"):
            checkpoint.Writer(tmp_path)
        writer.wait()
        assert checkpoint.restore(tmp_path).step == 1  # readers need no lock
    with pytest.raises(CheckpointError, match="closed"):
        writer.save(2, {"x": np.ones(1)})
    checkpoint.Writer(tmp_path).close()


def test_a_sound_step_is_not_written_over_and_a_damaged_one_is(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"x": np.ones(2)})
    with pytest.raises(CheckpointError, match="step 1 exists and is sound"):
        checkpoint.save(tmp_path, 1, {"x": np.zeros(2)})
    flip(files_of(step_folder(tmp_path, 1))[0], 3)
    checkpoint.save(tmp_path, 1, {"x": np.zeros(2)})
    assert checkpoint.restore(tmp_path).value["x"].tolist() == [0, 0]


def test_what_a_killed_writer_left_is_never_listed_and_goes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"x": np.ones(2)})
    half = tmp_path / ".work" / "save-000000000002-abc"
    shutil.copytree(step_folder(tmp_path, 1), half)
    (tmp_path / "steps" / "3.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.Writer(tmp_path).close()
    assert not half.exists()


def test_a_failed_save_is_told_once_leaves_nothing_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[BaseException] = []
    write = _orbax.write

    def full(folder: Path, arrays: Any) -> None:
        write(folder, arrays)
        raise OSError(28, "No space left on device")

    with checkpoint.Writer(tmp_path, on_failure=errors.append) as writer:
        writer.save(1, {"x": np.ones(2)})
        writer.wait()
        monkeypatch.setattr(_orbax, "write", full)
        writer.save(2, {"x": np.ones(2)})
        assert not writer.wait()
        assert [type(error) for error in errors] == [OSError]
        assert list((tmp_path / ".work").iterdir()) == []
        monkeypatch.setattr(_orbax, "write", write)
        writer.save(3, {"x": np.ones(2)})
        assert writer.wait()
        assert (writer.num_saved, writer.num_failed, len(errors)) == (2, 1, 1)
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_a_failed_save_warns_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, arrays: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_orbax, "write", full)
    writer = checkpoint.Writer(tmp_path)
    writer.save(1, {"x": np.ones(2)})
    with pytest.warns(checkpoint.CheckpointWarning, match="No space left"):
        writer.close()


def test_a_budget_without_room_for_two_steps_refuses_and_keeps_the_good_one(
    tmp_path: Path,
) -> None:
    errors: list[BaseException] = []
    keep = checkpoint.latest(5) & checkpoint.within_bytes(6_000_000)
    with checkpoint.Writer(tmp_path, keep=keep, on_failure=errors.append) as writer:
        for step in range(2):
            writer.save(step, {"x": np.full(1 << 20, step, np.float32)})
            writer.wait()
    assert checkpoint.steps(tmp_path) == [0]
    assert "must have room for two steps" in str(errors[0])


def test_nothing_to_restore(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="not a checkpoint folder"):
        checkpoint.restore(tmp_path / "nowhere")
    checkpoint.Writer(tmp_path).close()
    with pytest.raises(NoCheckpointError, match="holds no step"):
        checkpoint.restore(tmp_path)
    checkpoint.save(tmp_path, 3, {"x": np.ones(2)})
    with pytest.raises(NoCheckpointError, match=r"no step 4; there are \[3\]"):
        checkpoint.restore(tmp_path, 4)


def test_a_size_is_bounded_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, value(big=300_000))
    with pytest.raises(CheckpointError, match="max_bytes is 1000000; pass a larger one"):
        checkpoint.restore(tmp_path, max_bytes=10**6)
    checkpoint.restore(tmp_path, max_bytes=10**6, only="pair")


def test_keys(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "sealed", 1, {"x": np.ones(2)}, key=KEY)
    assert checkpoint.restore(tmp_path / "sealed", key=KEY).step == 1
    assert checkpoint.restore(tmp_path / "sealed").step == 1  # integrity without authenticity
    with pytest.raises(CorruptCheckpointError, match="hmac-sha256 does not match"):
        checkpoint.restore(tmp_path / "sealed", 1, key=b"another key, as long")
    checkpoint.save(tmp_path / "open", 1, {"x": np.ones(2)})
    with pytest.raises(CorruptCheckpointError, match="no HMAC, but a key is given"):
        checkpoint.restore(tmp_path / "open", 1, key=KEY)
    with pytest.raises(CheckpointError, match="at least 16 bytes"):
        checkpoint.Writer(tmp_path / "short", key=b"short")
