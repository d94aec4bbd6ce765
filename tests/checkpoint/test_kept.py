"""A writer removes only what is proven corrupt, and only once a newer step is sound."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_support import fail, files_of, flip, step_folder

import esper_fn as ef
from esper_fn import checkpoint
from esper_fn.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError

KEY = b"0123456789abcdef"
OTHER_KEY = b"another key, as long"
STEPS = (1, 2, 3)

pytestmark = pytest.mark.filterwarnings("ignore::esper_fn.checkpoint.CheckpointWarning")


def value(step: int) -> dict[str, Any]:
    return {"x": np.full(3, step, np.float32)}


def filled(folder: Path, key: bytes | None = None) -> Path:
    for step in STEPS:
        checkpoint.save(folder, step, value(step), key=key)
    return folder


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, number: int, *names: str) -> Iterator[None]:
    """Opening files whose path holds one of these names fails, as root never sees it fail."""
    real, real_open = os.open, builtins.open

    def check(path: Any) -> None:
        if not isinstance(path, int) and any(name in os.fspath(path) for name in names):
            raise OSError(number, os.strerror(number), os.fspath(path))

    def os_open(path: Any, *arguments: Any, **options: Any) -> int:
        check(path)
        return real(path, *arguments, **options)

    def plain_open(path: Any, *arguments: Any, **options: Any) -> Any:
        check(path)
        return real_open(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", os_open)
        patch.setattr(builtins, "open", plain_open)
        yield


def save_next(folder: Path, key: bytes | None = None, **options: Any) -> None:
    keep = options.pop("keep", checkpoint.latest(1))
    with checkpoint.Writer(folder, keep=keep, key=key, on_failure=fail, **options) as writer:
        writer.save(4, value(4))
        assert writer.wait()


def assert_all_there(folder: Path, key: bytes | None = None) -> None:
    """Every old step is back, bit for bit, for whoever reads rightly."""
    assert set(STEPS) <= set(checkpoint.steps(folder))
    for step in STEPS:
        assert checkpoint.restore(folder, step, key=key).value["x"].tolist() == [step] * 3


def newer_format(folder: Path) -> Callable[[], None]:
    """Every step but its manifest's version; returns what puts them back."""
    old = {step: (step_folder(folder, step) / "manifest.jsonl").read_bytes() for step in STEPS}
    for step, data in old.items():
        content = json.loads(data.split(b"\n")[0])
        payload = json.dumps(content | {"version": 999}, separators=(",", ":")).encode()
        seal = b'{"sha256":"' + hashlib.sha256(payload).hexdigest().encode() + b'"}'
        (step_folder(folder, step) / "manifest.jsonl").write_bytes(payload + b"\n" + seal + b"\n")

    def back() -> None:
        for step, data in old.items():
            (step_folder(folder, step) / "manifest.jsonl").write_bytes(data)

    return back


KEYS = {
    "a wrong key": (KEY, OTHER_KEY),
    "a key set on a plain folder": (None, KEY),
    "a plain writer on a signed folder": (KEY, None),
}


@pytest.mark.parametrize("name", KEYS)
def test_steps_of_another_key_stay(tmp_path: Path, name: str) -> None:
    written, present = KEYS[name]
    folder = filled(tmp_path / "run", written)
    save_next(folder, present)
    assert checkpoint.restore(folder, 4, key=present).step == 4
    assert_all_there(folder, written)
    for _ in range(2):
        checkpoint.prune(folder, checkpoint.latest(1), key=present)
    assert_all_there(folder, written)


@pytest.mark.parametrize("name", KEYS)
def test_a_step_of_another_key_is_not_written_over(tmp_path: Path, name: str) -> None:
    written, present = KEYS[name]
    folder = filled(tmp_path / "run", written)
    with checkpoint.Writer(folder, key=present, on_failure=fail) as writer:
        if present is None:  # signed steps are read without a key
            with pytest.raises(CheckpointError, match="exists and is sound"):
                writer.save(3, value(30))
            return
        writer.save(3, value(30))
    assert checkpoint.restore(folder, 3, key=present).value["x"].tolist() == [30] * 3
    (aside,) = (folder / "set_aside").iterdir()
    shutil.rmtree(step_folder(folder, 3))
    aside.rename(step_folder(folder, 3))
    assert_all_there(folder, written)


def test_a_newer_format_stays(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    back = newer_format(folder)
    save_next(folder)
    decisions = checkpoint.prune(folder, checkpoint.latest(1))
    assert [decision.is_kept for decision in decisions] == [True] * 4
    with checkpoint.Writer(folder, on_failure=fail) as writer:
        writer.save(5, value(5))
    back()
    assert_all_there(folder)


ERRORS = (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENFILE, errno.EMFILE, errno.EPERM)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["manifest.jsonl", "run.json"])
def test_what_cannot_be_read_for_a_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    folder = filled(tmp_path / "run")
    names = [f"{step_folder(folder, step)}/{name}" for step in STEPS]
    names = names if name == "manifest.jsonl" else [name]
    with checkpoint.Writer(folder, keep=checkpoint.latest(1), on_failure=lambda _: None) as writer:
        with failing(monkeypatch, number, *names):
            writer.save(4, value(4))
            writer.wait()
            writer.save(5, value(5))
            writer.wait()
        assert_all_there(folder)
        assert {4, 5} <= set(checkpoint.steps(folder))
    with failing(monkeypatch, number, *names):
        if name == "manifest.jsonl":
            checkpoint.prune(folder, checkpoint.latest(1))
        else:
            with pytest.raises(CheckpointError, match=os.strerror(number)):
                checkpoint.prune(folder, checkpoint.latest(1))
    assert_all_there(folder)
    # Once it can be read, the retention has its say again.
    checkpoint.prune(folder, checkpoint.latest(1))
    assert checkpoint.steps(folder) == [5]


def test_a_newest_step_that_cannot_be_read_is_passed_over_said_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = filled(tmp_path / "run")
    data = max(files_of(step_folder(folder, 3) / "data"), key=lambda file: file.stat().st_size)
    for name in (str(data), f"{step_folder(folder, 3)}/manifest.jsonl"):
        copy = Path(shutil.copytree(folder, tmp_path / str(len(name))))
        moved = name.replace(str(folder), str(copy))
        with checkpoint.Writer(copy, keep=checkpoint.latest(1), on_failure=fail) as writer:
            with failing(monkeypatch, errno.EIO, moved):
                with pytest.raises(ef.errors.UnreadableCheckpointError, match="Input/output"):
                    checkpoint.restore(copy, 3)
                restored = writer.restore()
            assert restored.step == 2
            assert [(decision.step, decision.verdict) for decision in restored.passed_over] == [
                (3, "unreadable")
            ]
            writer.save(3, value(3))  # the run comes there again
            writer.save(4, value(4))
        (aside,) = (copy / "set_aside").iterdir()
        shutil.rmtree(step_folder(copy, 3), ignore_errors=True)
        aside.rename(step_folder(copy, 3))
        assert checkpoint.restore(copy, 3).value["x"].tolist() == [3] * 3


def test_unknown_files_are_not_removed(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    notes = step_folder(folder, 1) / "notes.txt"
    notes.write_text("why this one is the best")
    (folder / "steps" / "mine").mkdir()
    (folder / ".work" / "mine").mkdir()
    save_next(folder)
    checkpoint.prune(folder, checkpoint.latest(1))
    assert notes.read_text() == "why this one is the best"
    assert (folder / "steps" / "mine").is_dir()
    assert (folder / ".work" / "mine").is_dir()
    assert checkpoint.steps(folder) == [1, 4]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "manifest.jsonl").unlink(),
        lambda folder: (folder / "manifest.jsonl").write_bytes(b""),
        lambda folder: flip(folder / "manifest.jsonl", 40),
    ],
    ids=["missing", "empty", "flipped"],
)
def test_a_step_without_an_authentic_manifest_is_not_proven_corrupt(
    tmp_path: Path, spoil: Callable[[Path], Any]
) -> None:
    folder = filled(tmp_path / "run")
    spoil(step_folder(folder, 2))
    before = [file.read_bytes() for file in files_of(step_folder(folder, 2))]
    save_next(folder)
    checkpoint.prune(folder, checkpoint.latest(1))
    assert [file.read_bytes() for file in files_of(step_folder(folder, 2))] == before
    assert checkpoint.steps(folder) == [2, 4]


def spoil_data(folder: Path, step: int) -> None:
    flip(max(files_of(step_folder(folder, step) / "data"), key=lambda f: f.stat().st_size), 3)


def test_a_corrupt_step_goes_when_the_new_one_is_sound_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = filled(tmp_path / "run")
    spoil_data(folder, 3)
    problems: list[BaseException] = []
    keep = checkpoint.everything()
    with checkpoint.Writer(folder, keep=keep, on_failure=problems.append) as writer:
        assert writer.restore().step == 2
        for step in (3, 4):
            with failing(monkeypatch, errno.ENOSPC, ".manifest.jsonl.tmp"):
                writer.save(step, value(step))
                assert not writer.wait()
            assert checkpoint.steps(folder) == [1, 2, 3]
            assert checkpoint.verify(folder)[3] is not None
        writer.save(3, value(3))
        assert writer.wait()
        assert not (folder / "set_aside").exists() or not list((folder / "set_aside").iterdir())
    assert len(problems) == 2
    assert_all_there(folder)


def test_a_corrupt_step_that_was_mended_meanwhile_stays(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    copy = Path(shutil.copytree(step_folder(folder, 3), tmp_path / "copy"))
    spoil_data(folder, 3)
    with checkpoint.Writer(folder, keep=checkpoint.everything(), on_failure=fail) as writer:
        assert writer.restore().step == 2
        shutil.rmtree(step_folder(folder, 3))
        shutil.copytree(copy, step_folder(folder, 3))
        writer.save(4, value(4))
    assert checkpoint.steps(folder) == [1, 2, 3, 4]
    assert_all_there(folder)


def test_a_byte_budget_leaves_the_last_sound_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new writer knows of no sound step yet; the newest is corrupt; the save fails."""
    folder = filled(tmp_path / "run")
    spoil_data(folder, 3)
    keep = checkpoint.latest(1) & checkpoint.within_bytes(600_000)
    with checkpoint.Writer(folder, keep=keep, on_failure=lambda _: None) as writer:
        with failing(monkeypatch, errno.ENOSPC, ".manifest.jsonl.tmp"):
            writer.save(4, value(4))
            assert not writer.wait()
        assert checkpoint.restore(folder).value["x"].tolist() == [2] * 3


def test_a_folder_that_cannot_be_listed_fails_the_save_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = filled(tmp_path / "run")
    problems: list[BaseException] = []
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if os.fspath(path).endswith("steps"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return scandir(path)

    with checkpoint.Writer(folder, on_failure=problems.append) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refuse)
            writer.save(4, value(4))
            writer.wait()
        assert [type(error) for error in problems] == [OSError]
        writer.save(5, value(5))
        assert writer.wait()
    assert {2, 3, 5} <= set(checkpoint.steps(folder))


def test_what_stays_unjudged_is_said_once(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run", KEY)
    with checkpoint.Writer(folder, key=OTHER_KEY, on_failure=fail) as writer:
        writer.save(4, value(4))
        with pytest.warns(checkpoint.CheckpointWarning, match=r"stay \(1, 2, 3; .*hmac-sha256"):
            writer.wait()
        writer.save(5, value(5))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("said again"))
            writer.wait()
    with pytest.raises(NoCheckpointError):
        checkpoint.restore(folder, key=b"a third key of 16 bytes")
    with pytest.raises(CorruptCheckpointError):
        checkpoint.restore(folder, 1, key=OTHER_KEY)
