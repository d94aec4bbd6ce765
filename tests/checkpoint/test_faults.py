"""Killed, out of room, not allowed, for long: what the fault matrix asks of checkpoints."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_support import fail, files_of
from saving import STEPS_KEPT, holds

from esper_fn import checkpoint
from esper_fn.checkpoint import _files, _orbax

HERE = Path(__file__).parent


# --- kill -9 -----------------------------------------------------------------------------------


def kill_and_restart(folder: Path, num_kills: int) -> int:
    """Kills the saving program at random times; returns the number of acknowledged steps."""
    source = np.random.default_rng(0)
    acknowledged = num_acknowledged = 0
    for index in range(num_kills):
        process = subprocess.Popen(
            [sys.executable, str(HERE / "saving.py"), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline().split()
        assert first[:1] == ["ready"], first
        # An acknowledgement may have been printed into a pipe that was never read to its end.
        assert int(first[1]) >= acknowledged
        # Every other time from the first acknowledgement on, else from the first save on.
        early = process.stdout.readline() if index % 2 else ""
        time.sleep(source.uniform(0.0, 0.25))
        process.kill()
        said = (early + process.stdout.read()).split("\n")[:-1]
        process.wait()
        process.stdout.close()
        assert all(line.startswith("acknowledged ") for line in said), said
        acknowledged = max([acknowledged, *(int(line.split()[1]) for line in said)])
        num_acknowledged += len(said)
        steps = checkpoint.steps(folder)
        assert not steps or checkpoint.verify(folder)[steps[-1]] is None
        assert max(steps, default=0) >= acknowledged
        restored = checkpoint.restore(folder) if steps else None
        assert restored is None or holds(restored.value, restored.step)
        assert len(steps) <= STEPS_KEPT + 1
    return num_acknowledged


def test_killed_at_random_times(tmp_path: Path) -> None:
    assert kill_and_restart(tmp_path / "run", 3) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_100_times(tmp_path: Path) -> None:
    assert kill_and_restart(tmp_path / "run", 100) > 100


class Killed(BaseException):
    """Stands for the end of the process at one point of the code."""


POINTS = {
    "before Orbax has written": (_orbax, "write", False),
    "after Orbax has written": (_orbax, "write", True),
    "before the files are on the disk": (_files, "sync_tree", False),
    "before the manifest": (_files, "write_synced", False),
    "after the manifest, before the rename": (_files, "write_synced", True),
    "before the rename": (os, "rename", False),
    "after the rename, before the folder is on the disk": (os, "rename", True),
    "in the middle of collecting": (shutil, "rmtree", False),
}


@pytest.mark.parametrize("point", POINTS)
def test_ended_at_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Everything after the point is left undone, the cleaning up included."""
    module, name, is_after = POINTS[point]
    original = getattr(module, name)

    def dies(*arguments: Any, **options: Any) -> Any:
        if is_after:
            original(*arguments, **options)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        raise Killed

    keep = checkpoint.latest(2)
    writer = checkpoint.Writer(tmp_path, keep=keep, on_failure=lambda error: None)
    for step in (1, 2):
        writer.save(step, {"x": np.full(3, step)})
        assert writer.wait()
    monkeypatch.setattr(module, name, dies)
    writer.save(3, {"x": np.full(3, 3)})
    assert not writer.wait()
    monkeypatch.undo()
    writer.close()
    listed = checkpoint.steps(tmp_path)
    assert 2 in listed
    assert set(checkpoint.verify(tmp_path).values()) == {None}
    newest = checkpoint.restore(tmp_path)
    assert newest.value["x"].tolist() == [newest.step] * 3
    checkpoint.Writer(tmp_path).close()
    assert list((tmp_path / ".work").iterdir()) == []
    assert checkpoint.steps(tmp_path) == listed


# --- no room, no permission --------------------------------------------------------------------


def run_limited(program: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_file_that_may_not_grow_leaves_the_step_before(tmp_path: Path) -> None:
    """The system refuses the bytes, to Orbax's own threads too, as on a full disk."""
    program = """
        import resource, sys
        import numpy as np
        from esper_fn import checkpoint
        errors = []
        state = lambda step: {"x": np.random.default_rng(step).normal(size=300_000)}
        with checkpoint.Writer(sys.argv[1], on_failure=errors.append) as writer:
            writer.save(1, state(1)); writer.wait()
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
            writer.save(2, state(2)); assert not writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            print(len(errors), len(list(writer.path.joinpath(".work").iterdir())))
            writer.save(3, state(3)); assert writer.wait()
        print(checkpoint.steps(sys.argv[1]), set(checkpoint.verify(sys.argv[1]).values()))
    """
    assert run_limited(program, tmp_path / "run") == "1 0\n[1, 3] {None}\n"


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if not mounted(disk, "size=5m"):
        pytest.skip("mounting a small file system needs root; the file size limit is tested above")
    errors: list[BaseException] = []
    try:
        with checkpoint.Writer(disk / "run", on_failure=errors.append) as writer:
            for step in range(4):
                writer.save(step, {"x": np.random.default_rng(step).normal(size=250_000)})
                writer.wait()
            assert writer.num_saved == 2
            assert checkpoint.verify(disk / "run") == {0: None, 1: None}
            assert list((disk / "run" / ".work").iterdir()) == []
            assert len(errors) == 2
            data = disk / "run" / "steps" / f"{0:012d}" / "data"
            next(file for file in data.rglob("*") if file.is_file()).write_bytes(b"damaged")
        checkpoint.prune(disk / "run", checkpoint.latest(1))
        with checkpoint.Writer(disk / "run", on_failure=fail) as writer:
            writer.save(9, {"x": np.random.default_rng(9).normal(size=250_000)})
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoint.save(folder, 1, {"x": np.ones(3)})
    is_mounted = False
    if os.geteuid() == 0:
        readonly = tmp_path / "disk"
        is_mounted = mounted(readonly, "size=6m")
        if not is_mounted:
            pytest.skip("root may write everywhere, and a read-only mount is not allowed here")
        shutil.copytree(folder, readonly / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(readonly)], check=True)
        folder = readonly / "run"
    else:
        folder.chmod(0o500)
    try:
        with pytest.raises(OSError, match=r"Read-only file system|Permission denied"):
            checkpoint.Writer(folder)
        assert checkpoint.restore(folder).step == 1  # reading needs no right to write
    finally:
        if is_mounted:
            subprocess.run(["umount", str(tmp_path / "disk")], check=True)
        else:
            folder.chmod(0o700)


# --- for long ----------------------------------------------------------------------------------


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory_over(folder: Path, num_saves: int) -> list[int]:
    sizes = []
    with checkpoint.Writer(folder, keep=checkpoint.latest(2), on_failure=fail) as writer:
        for step in range(num_saves):
            writer.save(step, {"x": np.full(1 << 21, step, np.float32)})
            writer.wait()
            sizes.append(resident_bytes())
    return sizes


@pytest.mark.slow
def test_memory_stays_over_200_saves(tmp_path: Path) -> None:
    sizes = memory_over(tmp_path, 230)[30:]
    assert np.median(sizes[-20:]) < 1.05 * np.median(sizes[:20])


def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for Orbax and the disk's own time, so that a day's saves take seconds."""

    def write(folder: Path, arrays: Any) -> None:
        folder.mkdir(parents=True)
        for name, array in arrays.items():
            (folder / name).write_bytes(array.tobytes())

    monkeypatch.setattr(_orbax, "write", write)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def within_budget(folder: Path, num_saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)
    budget = 5_000_000
    most = 0
    sync_tree, drop = _files.sync_tree, os.rename

    def watch(*_: Any, **__: Any) -> None:
        nonlocal most
        used = {file.stat().st_ino: file.stat().st_size for file in files_of(folder)}
        most = max(most, sum(used.values()))

    def synced(work: Path) -> None:
        watch()  # the arrays are written, the step is not yet listed: the fullest moment
        sync_tree(work)

    def renamed(source: Any, target: Any) -> None:
        drop(source, target)
        watch()

    monkeypatch.setattr(_files, "sync_tree", synced)
    monkeypatch.setattr(os, "rename", renamed)
    source = np.random.default_rng(0)
    host = source.normal(size=(1 << 17,))
    keep = (
        checkpoint.latest(3) | checkpoint.every(500) | checkpoint.best(2, "loss")
    ) & checkpoint.within_bytes(budget)
    with checkpoint.Writer(folder, keep=keep, on_failure=fail) as writer:
        for step in range(num_saves):
            size = int(source.integers(100, 100_000))  # a growing run's adapters come and go
            tree = {"host": host, "adapters": source.normal(size=(size,)), "step": step}
            if step % 1000 == 999:
                host = host + 1
            writer.save(step, tree, metrics={"loss": float(source.normal())}, parts=("host",))
    assert writer.num_saved == num_saves
    assert checkpoint.steps(folder)[-1] == num_saves - 1
    assert budget / 2 < most <= budget, most


def test_a_byte_budget_holds_at_all_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    within_budget(tmp_path / "run", 100, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_byte_budget_holds_over_10_000_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    within_budget(tmp_path / "run", 10_000, monkeypatch)
