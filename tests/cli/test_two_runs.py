"""One process at a time for a run's folder: the second is refused before anything is touched."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper_fn import checkpoint, report
from esper_fn.checkpoint._folder import exclusive
from esper_fn.cli import main
from esper_fn.errors import CheckpointError, RunFolderError

EVENT = {
    "arm": "grown", "step": 1, "seed": 0, "site": "s", "chunk": 0, "blueprint": None,
    "from": "DORMANT", "to": "GERMINATED", "cause": "command", "measured": {},
}  # fmt: skip
LIVING = """
import sys, time
from pathlib import Path
from esper_fn import checkpoint, report
what, path = sys.argv[1], Path(sys.argv[2])
if what in ("run", "both"):
    folder = report.create(path)
    folder.append_metrics({"arm": "grown", "step": 1, "loss": 0.5})
if what in ("fit", "both"):
    writer = checkpoint.Writer(path / "checkpoints" / "seed-0" / "grown")
    writer.save(1, {"x": 1.0})
    writer.wait()
if what == "fit":
    report.create(path / "other").close()
    (path / "esper-run.json").write_text('{"format": "esper-fn run", "schema": 1}')
print("ready", flush=True)
time.sleep(600)
"""


def _live(what: str, path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LIVING, what, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(params=["both", "run", "fit"])
def living(request, tmp_path):
    """A process that writes: a run and its checkpoints, a run, or checkpoints alone."""
    path = tmp_path / "run"
    process = _live(request.param, path)
    yield path, process
    _end(process)


def test_a_second_grow_is_refused_and_touches_nothing(living, capsys):
    path, process = living
    before = _contents(path)
    for options in ([], ["--overwrite"], ["--resume", "auto"]):
        if options == ["--resume", "auto"] and "esper-run.json" in before:
            owner = json.loads(before["esper-run.json"]).get("owner")
            if owner is None:
                continue  # only checkpoints are written: their own lock speaks later
        assert main(["grow", "--steps", "40", "--out", str(path), *options]) == 1
        error = capsys.readouterr().err
        assert f"process {process.pid} on this machine" in error or not options
        assert "Traceback" not in error
        assert _contents(path) == before
    assert process.poll() is None


def test_what_a_dead_process_left_is_no_obstacle(living):
    path, process = living
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (
        exclusive(path / "checkpoints"),
        report.create(path, overwrite=True) as folder,
    ):
        folder.append_event(EVENT)
    with checkpoint.Writer(path / "checkpoints" / "seed-0" / "grown") as writer:
        writer.save(2, {"x": 1.0})


def test_two_writers_and_a_prune_name_the_process(tmp_path, capsys):
    process = _live("fit", tmp_path)
    folder = tmp_path / "checkpoints" / "seed-0" / "grown"
    before = _contents(tmp_path)
    try:
        with pytest.raises(CheckpointError, match=f"process {process.pid} on this machine"):
            checkpoint.Writer(folder)
        assert main(["checkpoint", "prune", str(folder), "--latest", "1"]) == 1
        assert f"process {process.pid} on this machine" in capsys.readouterr().err
        assert _contents(tmp_path) == before
    finally:
        _end(process)


def test_the_same_process_is_told_so(tmp_path):
    with (
        report.create(tmp_path / "run"),
        pytest.raises(RunFolderError, match="this very process"),
    ):
        report.create(tmp_path / "run", overwrite=True)
    report.create(tmp_path / "run", overwrite=True).close()


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, None])
def no_locks(request, monkeypatch):
    """A file system, or a system, without locks."""
    import fcntl

    from esper_fn import _lock

    def refuse(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    if request.param is None:
        monkeypatch.setattr(_lock, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_of_the_system_the_named_process_counts(no_locks, tmp_path):
    path = tmp_path / "run"
    process = _live("run", path)
    try:
        with pytest.raises(RunFolderError, match=f"process {process.pid} on this machine"):
            report.create(path, overwrite=True)
    finally:
        _end(process)
    with (
        report.create(path, overwrite=True),
        pytest.raises(RunFolderError, match="this very process"),
    ):
        report.create(path, overwrite=True)
    marker = path / "esper-run.json"
    owner = {"pid": 1, "host": "elsewhere", "began": None}
    marker.write_text(json.dumps({"format": "esper-fn run", "schema": 1, "owner": owner}))
    with pytest.raises(RunFolderError, match="process 1 on 'elsewhere'; if it is gone"):
        report.create(path, overwrite=True)
    # A number that the system has given to another process since is no obstacle.
    owner = {"pid": os.getppid(), "host": os.uname().nodename, "began": "1"}
    marker.write_text(json.dumps({"format": "esper-fn run", "schema": 1, "owner": owner}))
    report.create(path, overwrite=True).close()
    for content in ("", "[]", "{", '{"owner": 5}', '{"owner": {"pid": -1}}'):
        marker.write_text(content)
        report.create(path, overwrite=True).close()


def test_a_link_in_place_of_the_marker_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "esper-run.json").symlink_to(tmp_path / "mine")
    assert main(["grow", "--steps", "40", "--out", str(tmp_path / "run"), "--overwrite"]) == 1
    assert (tmp_path / "mine").read_text() == "years of work"


@pytest.mark.slow
def test_a_real_run_goes_on_while_a_second_one_is_refused(tmp_path, capsys):
    path = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "esper_fn.cli", "grow", "--steps", "4000", "--policy", "never",
         "--save-every", "100", "--out", str(path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        end = time.monotonic() + 200
        while not list(path.glob("checkpoints/*/*/steps/*")):
            assert time.monotonic() < end
            time.sleep(0.1)
        for options in ([], ["--overwrite"], ["--resume", "auto"]):
            assert main(["grow", "--steps", "40", "--out", str(path), *options]) == 1
            assert f"process {process.pid}" in capsys.readouterr().err
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=100)
    assert process.returncode == 0
