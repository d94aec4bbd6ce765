"""The runner, driven with a planted benchmark and planted targets."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from benchmarks import _records, _runner, _targets
from benchmarks._records import BenchmarkError

TARGETS = """
[planted.speed]
at_most = 1.0
unit = "ms"
statistic = "median"
source = "the planted promise"

[planted.gain]
at_least = 2
unit = "ratio"
statistic = "low"
source = "the planted promise"
"""
MODULE = """
from benchmarks import Row, exact, summarise

def measure(*, quick):
    return {rows}
"""
HOLDING = (
    '{"speed": summarise([0.0004, 0.0005, 0.0006], "ms", shape=(3, 4)), '
    '"gain": Row(median=3.0, low=2.5, high=4.0, unit="ratio", count=9), '
    '"rival": exact(7 if quick else 8, "bytes")}'
)
Plant = Callable[..., None]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Register a benchmark ``planted`` that measures the given rows, with the given targets."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(_runner.BENCHMARKS, "planted", "planted_benchmark")
    monkeypatch.setattr(_runner, "TARGETS", tmp_path / "targets.toml")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def plant(rows: str = HOLDING, targets: str = TARGETS) -> None:
        monkeypatch.delitem(sys.modules, "planted_benchmark", raising=False)
        (tmp_path / "planted_benchmark.py").write_text(MODULE.replace("{rows}", rows))
        (tmp_path / "targets.toml").write_text(targets)

    plant()
    return plant


@pytest.fixture
def recorded(plant: Plant, results: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """A sound record of the planted benchmark, already in its file."""
    assert run("run", results) == 0
    capsys.readouterr()
    return json.loads((results / "planted.jsonl").read_text())


def run(action: str, results: Path, *more: str) -> int:
    return _runner.main(["planted", action, "--results", str(results), *more])


def write(results: Path, *lines: object) -> None:
    results.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (results / "planted.jsonl").write_text(text)


def without(record: dict[str, object], key: str) -> dict[str, object]:
    return {kept: value for kept, value in record.items() if kept != key}


class TestRun:
    @pytest.mark.usefixtures("plant")
    def test_records_one_line_that_says_where_it_was_taken(
        self, results: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("run", results) == 0
        (line,) = (results / "planted.jsonl").read_text().splitlines()
        record = json.loads(line)
        assert record["name"] == "planted"
        age = datetime.now(UTC) - datetime.fromisoformat(record["date"])
        assert timedelta() <= age < timedelta(minutes=1)
        assert record["command"] == f"python -m benchmarks planted run --results {results}"
        assert record["quick"] is False
        assert record["device"]["num_cores"] >= 1
        assert record["device"]["name"]
        assert record["versions"]["python"] == sys.version.split()[0]
        assert record["versions"]["numpy"] == np.__version__
        assert "jax" in record["versions"]
        assert record["rows"]["speed"] == {
            "median": 0.5,
            "low": pytest.approx(0.45),
            "high": pytest.approx(0.55),
            "unit": "ms",
            "count": 3,
            "shape": [3, 4],
        }
        assert list(record["rows"]) == ["speed", "gain", "rival"]
        printed = capsys.readouterr().out
        for said in ("speed", "0.5", "ms", "rival", "appended to"):
            assert said in printed

    @pytest.mark.usefixtures("plant")
    def test_appends_and_hands_quick_on(self, results: Path) -> None:
        assert run("run", results) == 0
        assert run("run", results, "--quick") == 0
        first, second = _records.read_records(results / "planted.jsonl")
        assert (first.quick, second.quick) == (False, True)
        assert (first.rows["rival"].median, second.rows["rival"].median) == (8, 7)
        assert second.command.endswith("--quick")

    @pytest.mark.usefixtures("recorded")
    def test_a_last_line_without_line_feed_is_not_joined(self, results: Path) -> None:
        path = results / "planted.jsonl"
        path.write_text(path.read_text().rstrip())
        assert run("run", results) == 0
        assert len(_records.read_records(path)) == 2

    @pytest.mark.usefixtures("plant")
    def test_a_malformed_file_costs_no_measurement(
        self, plant: Plant, results: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plant("1 / 0")
        write(results, "{")
        assert run("run", results) == 1
        assert "line 1 is no record" in capsys.readouterr().err

    def test_numpy_values_are_plain(self, plant: Plant, results: Path) -> None:
        plant(
            '{"a": exact(__import__("numpy").float32(2), "ms", '
            'sizes=__import__("numpy").arange(2))}'
        )
        assert run("run", results) == 0
        (record,) = _records.read_records(results / "planted.jsonl")
        assert record.rows["a"].extra == {"sizes": [0, 1]}
        assert record.rows["a"].median == 2.0

    @pytest.mark.parametrize(
        ("rows", "reason"),
        [
            ("{}", "measured no row"),
            ('{"a": exact(1, "ms", what=object())}', "what JSON cannot say"),
            ('{"a": exact(1, "ms", what=float("nan"))}', "what JSON cannot say"),
        ],
    )
    def test_refuses_rows_that_cannot_be_recorded(
        self,
        rows: str,
        reason: str,
        plant: Plant,
        results: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        plant(rows)
        assert run("run", results) == 1
        assert reason in capsys.readouterr().err
        assert not (results / "planted.jsonl").exists()


class TestCheck:
    @pytest.mark.usefixtures("recorded")
    def test_passes_when_every_target_holds(
        self, results: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("check", results) == 0
        printed = capsys.readouterr().out
        assert printed.count("PASS") == 2
        assert "median at most 1 ms" in printed
        assert "low at least 2 ratio" in printed
        assert "FAIL" not in printed

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"speed": {"median": 1.1, "high": 1.2}}, "FAIL: falls short"),
            ({"gain": {"low": 1.9}}, "FAIL: falls short"),
            ({"speed": {"unit": "us"}}, "FAIL: measured in us"),
        ],
    )
    def test_fails_when_a_figure_falls_short(
        self,
        changed: dict[str, dict[str, object]],
        reason: str,
        recorded: dict[str, object],
        results: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for row, figures in changed.items():
            recorded["rows"][row].update(figures)
        write(results, recorded)
        assert run("check", results) == 1
        printed = capsys.readouterr().out
        assert reason in printed
        assert printed.count("PASS") == 1
        assert "1 of 2 targets fall short" in printed

    def test_a_figure_on_its_bound_holds(self, recorded: dict[str, object], results: Path) -> None:
        recorded["rows"]["speed"].update(median=1.0, high=9.0)
        recorded["rows"]["gain"].update(low=2.0)
        write(results, recorded)
        assert run("check", results) == 0

    def test_fails_when_a_row_is_missing(
        self,
        recorded: dict[str, object],
        results: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        del recorded["rows"]["gain"]
        write(results, recorded)
        assert run("check", results) == 1
        assert "FAIL: not measured" in capsys.readouterr().out

    def test_only_the_newest_line_counts(self, recorded: dict[str, object], results: Path) -> None:
        short = json.loads(json.dumps(recorded))
        short["rows"]["speed"].update(median=2.0, high=2.0)
        write(results, short, recorded)
        assert run("check", results) == 0
        write(results, recorded, short)
        assert run("check", results) == 1

    @pytest.mark.usefixtures("plant")
    def test_nothing_recorded_names_the_command(
        self, results: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("check", results) == 1
        error = capsys.readouterr().err
        assert "nothing is recorded" in error
        assert "python -m benchmarks planted run" in error

    def test_no_target_is_not_a_pass(
        self, plant: Plant, results: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plant(targets="")
        assert run("check", results) == 1
        assert "holds no target" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"name": "planted", "rows"', "Expecting"),
            ("", "Expecting value"),
            ("[]", "list, not an object"),
            (lambda record: without(record, "rows"), "'rows' is missing"),
            (lambda record: without(record, "device"), "'device' is missing"),
            (lambda record: {**record, "date": 3}, "date is 3, not str"),
            (lambda record: {**record, "name": "other"}, "of 'other', not of 'planted'"),
            (lambda record: {**record, "rows": {"speed": 3}}, "'speed' is 3"),
            (lambda record: {**record, "rows": {"speed": {"median": 1}}}, "lacks low, high, unit"),
            (lambda record: changed_row(record, median=True), "median of row 'speed' is True"),
            (lambda record: changed_row(record, median="1"), "median of row 'speed' is '1'"),
            (lambda record: changed_row(record, count=1.5), "not a whole number"),
            (lambda record: changed_row(record, unit=None), "unit of row 'speed' is None"),
            (lambda record: changed_row(record, low=10**400), "too large"),
            (lambda record: changed_row(record, low=5), "in this order"),
            (lambda record: changed_row(record, low=float("nan")), "NaN is not a figure"),
        ],
    )
    def test_a_malformed_line_is_named(
        self,
        line: str | Callable[[dict[str, object]], dict[str, object]],
        reason: str,
        recorded: dict[str, object],
        results: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        write(results, recorded, line if isinstance(line, str) else line(recorded))
        assert run("check", results) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {results / 'planted.jsonl'}, line 2 is no record: ")
        assert reason in error
        assert "python -m benchmarks planted run" in error


def changed_row(record: dict[str, object], **changed: object) -> dict[str, object]:
    speed = {**record["rows"]["speed"], **changed}
    return {**record, "rows": {**record["rows"], "speed": speed}}


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ([], "the following arguments are required: name"),
            (["nothing", "run"], "lifecycle"),
            (["lifecycle"], "needs one of run, check"),
            (["lifecycle", "walk"], "choose from"),
            (["list", "run"], "`list` and `pages` take no action"),
            (["lifecycle", "check", "--quick"], "--quick belongs to run"),
        ],
    )
    def test_wrong_usage_exits_with_2_and_names_what_is_allowed(
        self, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            _runner.main(arguments)
        assert caught.value.code == 2
        assert reason in capsys.readouterr().err

    def test_list_names_every_benchmark(self) -> None:
        printed = subprocess.run(
            [sys.executable, "-m", "benchmarks", "list"],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(_runner.__file__).parents[1],
        ).stdout
        assert [line.split() for line in printed.splitlines()] == [
            [name, module] for name, module in _runner.BENCHMARKS.items()
        ]


class TestTargets:
    def test_every_benchmark_has_targets_and_the_other_way_round(self) -> None:
        assert set(_targets.read_targets(_runner.TARGETS)) == set(_runner.BENCHMARKS)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("[planted", "cannot be read"),
            ("planted = 3", "must be a table of rows"),
            ("[planted]\nspeed = 3", "must be a table with keys among"),
            (TARGETS.replace("source", "sauce"), "must be a table with keys among"),
            (TARGETS.replace("at_most = 1.0", ""), "exactly one of at_most and at_least"),
            (TARGETS.replace("at_most", "at_least = 3\nat_most"), "exactly one of"),
            (TARGETS.replace("1.0", "nan"), "a finite number"),
            (TARGETS.replace("1.0", "true"), "a finite number"),
            (TARGETS.replace('"ms"', "3"), "needs unit, a string"),
            (TARGETS.replace('"the planted promise"', '""'), "needs source, a string"),
            (TARGETS.replace('"median"', '"mean"'), "'mean'; choose one of median, low, high"),
        ],
    )
    def test_refuses_a_malformed_table(self, text: str, reason: str, tmp_path: Path) -> None:
        path = tmp_path / "targets.toml"
        path.write_text(text)
        with pytest.raises(BenchmarkError, match=reason):
            _targets.read_targets(path)

    def test_says_when_there_is_no_table(self, tmp_path: Path) -> None:
        with pytest.raises(BenchmarkError, match="cannot be read"):
            _targets.read_targets(tmp_path / "targets.toml")


class TestConditions:
    @pytest.fixture(autouse=True)
    def _no_repository_from_outside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Git hands its hooks GIT_DIR and the like, which would lead these tests elsewhere.
        for variable in [name for name in os.environ if name.startswith("GIT_")]:
            monkeypatch.delenv(variable)

    def test_cpu_model_is_read_where_linux_says_it(self, tmp_path: Path) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text("processor\t: 0\nmodel name\t: Planted 9000\nmodel name\t: Other\n")
        assert _records._cpu_model(path) == "Planted 9000"
        assert _records._cpu_model(tmp_path / "absent")

    def test_an_accelerator_is_named_by_the_library_that_is_loaded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Device:
            platform, device_kind = "gpu", "Planted GPU"

        class Jax:
            @staticmethod
            def devices() -> list[Device]:
                return [Device(), Device()]

        monkeypatch.setitem(sys.modules, "jax", Jax)
        device = _records._device()
        assert (device["platform"], device["name"]) == ("gpu", "Planted GPU")
        assert device["num_devices"] == 2
        assert device["cpu"]

    def test_no_commit_is_none(self, tmp_path: Path) -> None:
        assert _records._git(tmp_path) is None

    def test_commit_and_dirt_are_noted(self, tmp_path: Path) -> None:
        identity = ["-c", "user.name=planted", "-c", "user.email=planted@example.org"]
        (tmp_path / "file").write_text("one")
        for command in (
            ["init", "-q"],
            ["add", "file"],
            ["commit", "-q", "--no-verify", "-m", "x"],
        ):
            subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True)
        noted = _records._git(tmp_path)
        assert len(noted["commit"]) == 40
        assert noted["is_dirty"] is False
        (tmp_path / "file").write_text("two")
        assert _records._git(tmp_path) == {**noted, "is_dirty": True}
