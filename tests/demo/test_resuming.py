"""`esper grow` stopped anywhere and gone on with is `esper grow`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from esper_fn import checkpoint, cli, report
from esper_fn.demo import data, jobs
from esper_fn.errors import ResumeError

STEPS = 80


@pytest.fixture(scope="module")
def comparison() -> jobs.Comparison:
    return jobs.prepare(jobs.get("digits"), data.load("digits"), steps=STEPS)


@contextmanager
def saved(comparison: jobs.Comparison, checkpoints: jobs.ArmCheckpoints) -> Iterator[None]:
    comparison.checkpoints = checkpoints
    try:
        yield
    finally:
        comparison.checkpoints = None


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between any two runs."""
    return {name: value for name, value in row.items() if name != "wall_seconds"}


def stop_after(num_calls: int) -> Callable[[], bool]:
    """A function that is False `num_calls` times and True from then on."""
    calls = itertools.count()
    return lambda: next(calls) >= num_calls


def stopped_again_and_again(
    comparison: jobs.Comparison, folder: Path, run: Callable[[], Any]
) -> tuple[Any, int]:
    """What `run` returns when it is stopped ever later and resumed each time; and how often."""
    for num_stops in range(40):
        checkpoints = jobs.ArmCheckpoints(
            folder, every_steps=1000, should_stop=stop_after(num_stops + 1)
        )
        with saved(comparison, checkpoints):
            try:
                return run(), num_stops
            except jobs.StoppedError as stop:
                is_saved = stop.is_saved
        assert is_saved
    raise AssertionError("never finished")


@pytest.mark.slow
def test_an_arm_stopped_and_its_listener(comparison: jobs.Comparison, tmp_path: Path) -> None:
    def run() -> tuple[jobs.ArmResult, list[jobs.Progress]]:
        reports: list[jobs.Progress] = []
        return comparison.run_growing(0, reports.append), reports

    expected, reports = run()
    assert any(row.events for row in reports)
    (arm, again), num_stops = stopped_again_and_again(comparison, tmp_path, run)
    assert num_stops >= 2
    assert arm == expected
    assert again == reports


@pytest.mark.slow
def test_stopped_in_every_arm(comparison: jobs.Comparison, tmp_path: Path) -> None:
    def run() -> tuple[dict[str, Any], list[jobs.Progress]]:
        reports: list[jobs.Progress] = []
        return jobs.run(comparison, 0, reports.append), reports

    expected, reports = run()
    (row, again), num_stops = stopped_again_and_again(comparison, tmp_path, run)
    assert num_stops >= 6
    assert {path.name for path in (tmp_path / "seed-0").iterdir()} == {
        "host", "grown", "uniform", "random", "static",
    }  # fmt: skip
    assert timeless(row) == timeless(expected)
    assert again == reports
    assert row["wall_seconds"] > 0


def test_another_job_is_refused_by_name(comparison: jobs.Comparison, tmp_path: Path) -> None:
    with saved(comparison, jobs.ArmCheckpoints(tmp_path, settings={"policy": "periodic"})):
        comparison.run_host(0)
        comparison.checkpoints = jobs.ArmCheckpoints(tmp_path, settings={"policy": "plateau"})
        with pytest.raises(ResumeError, match="policy is 'plateau' now and was 'periodic'"):
            comparison.run_host(0)


def lines(folder: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_stopped_by_sigterm_and_killed(tmp_path: Path) -> None:
    """The main job as a program: SIGTERM in the grown arm, SIGKILL in the random one."""

    def grow(name: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable, "-m", "esper_fn.cli", "grow", "--steps", "300", "--save-every",
                "50", "--out", str(tmp_path / name), *more,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def finish(name: str, *more: str) -> None:
        process = grow(name, *more)
        said = process.communicate(timeout=400)
        assert process.returncode == 0, said

    finish("whole")
    process = grow("stopped", "--resume", "auto")
    assert process.stdout is not None
    assert any("grown where" in line and "step" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "saved; `--resume auto` with the same options goes on" in said
    assert not (tmp_path / "stopped" / "summary.json").exists()

    process = grow("stopped", "--resume", "auto")
    assert process.stdout is not None
    assert any("grown at random" in line and "step" in line for line in process.stdout)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    finish("stopped", "--resume", "auto")
    whole, stopped = (report.read(tmp_path / name) for name in ("whole", "stopped"))
    assert timeless(whole.summary) == timeless(stopped.summary)
    assert (whole.events, whole.metrics) == (stopped.events, stopped.metrics)
    for file in sorted((tmp_path / "stopped" / "checkpoints").glob("*/*")):
        assert set(checkpoint.verify(file).values()) == {None}


def test_overwriting_forgets_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with report.create(folder):
        pass
    checkpoint.save(folder / "checkpoints" / "seed-0" / "host", 1, {})

    def stop(*_: Any, **__: Any) -> Any:
        raise jobs.StoppedError("host", 0, is_saved=True)

    monkeypatch.setattr(jobs, "run", stop)
    assert cli.main(["grow", "--out", str(folder), "--resume", "auto"]) == 0
    assert (folder / "checkpoints" / "seed-0" / "host").exists()
    assert cli.main(["grow", "--out", str(folder)]) == 1
    assert (folder / "checkpoints" / "seed-0" / "host").exists()
    assert cli.main(["grow", "--out", str(folder), "--overwrite"]) == 0
    assert not (folder / "checkpoints").exists()
