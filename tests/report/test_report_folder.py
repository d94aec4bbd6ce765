import enum
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from synthetic_run import write

from esper_fn import report
from esper_fn.errors import EsperError, RunFolderError

EVENT: dict[str, Any] = {
    "arm": "grown",
    "step": 3,
    "seed": 12,
    "site": "hidden",
    "chunk": 1,
    "blueprint": None,
    "from": "DORMANT",
    "to": "GERMINATED",
    "cause": "policy:plateau",
    "measured": {"potential": 0.5, "contribution": None},
}
METRICS: dict[str, Any] = {
    "arm": "grown",
    "step": 3,
    "loss": 1.5,
    "test_accuracy": None,
    "test_loss": None,
    "parameters": 100,
    "stages": {"DORMANT": 3},
    "alpha": {"12": 0.25},
}


def finished(path: Path) -> Path:
    with report.create(path) as folder:
        folder.append_event(EVENT)
        folder.append_metrics(METRICS)
        folder.finish({"data": "digits"})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = report.read(finished(tmp_path / "deep" / "er" / "run"))
    assert run.summary == {"data": "digits", "schema": 1}
    assert run.events == [EVENT]
    assert run.metrics == [METRICS]


def test_a_segment_of_training_is_recorded(tmp_path: Path) -> None:
    event = {key: EVENT[key] for key in EVENT if key != "arm"}
    infos = SimpleNamespace(
        stage=np.array([[0, 0, 0], [0, 3, 7]]),
        alpha=np.array([[0, 0, 0], [0, 0.25, 1]], np.float32),
        num_parameters=np.array([0, 40]),
    )
    grown = SimpleNamespace(
        first_step=2, num_steps=2, losses=np.array([2.0, 1.0]), infos=infos, events=[event]
    )
    host = SimpleNamespace(first_step=0, num_steps=5, losses=np.array([0.5]), infos=None, events=[])
    with report.create(tmp_path / "run") as folder:
        folder.record(grown, host_parameters=60, test_accuracy=0.5)
        folder.record(host, arm="host", host_parameters=60)
        folder.finish({})
    run = report.read(tmp_path / "run")
    assert run.events == [EVENT]
    stages = {"DORMANT": 1, "GRAFTING": 1, "FOSSILIZED": 1}
    assert run.metrics == [
        {
            "arm": "grown", "step": 4, "loss": 1.5, "parameters": 100, "stages": stages,
            "alpha": {"1": 0.25, "2": 1.0}, "test_accuracy": 0.5,
        },
        {"arm": "host", "step": 5, "loss": 0.5, "parameters": 60},
    ]  # fmt: skip


def test_a_whole_run_survives_the_folder(tmp_path: Path, run: report.Run) -> None:
    assert report.read(write(run, tmp_path / "run")) == run


def test_the_error_is_of_both_trees() -> None:
    assert issubclass(RunFolderError, EsperError)
    assert issubclass(RunFolderError, ValueError)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} in a JSON file")


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with report.create(path) as folder:
        folder.append_event({**EVENT, "measured": {"a": float("nan"), "b": float("-inf")}})
        folder.append_metrics(
            {**METRICS, "loss": np.float32("inf"), "alpha": {12: np.array(np.nan)}}
        )
        folder.finish({"grown_accuracy": float("nan"), "nested": [{"x": np.array([1.0, np.inf])}]})
    for file in path.iterdir():
        text = file.read_text()
        for line in [text] if file.suffix == ".json" else text.splitlines():
            json.loads(line, parse_constant=refuse_constant)
    run = report.read(path)
    assert run.events[0]["measured"] == {"a": None, "b": None}
    assert run.metrics[0]["loss"] is None
    assert run.metrics[0]["alpha"] == {"12": None}
    assert run.summary["grown_accuracy"] is None
    assert run.summary["nested"] == [{"x": [1.0, None]}]


def test_stages_may_be_given_as_enums(tmp_path: Path) -> None:
    stage = enum.IntEnum("stage", ["DORMANT", "GERMINATED"], start=0)
    with report.create(tmp_path / "run") as folder:
        folder.append_event({**EVENT, "from": stage(0), "to": stage(1), "step": np.int32(3)})
        folder.append_metrics({**METRICS, "stages": {stage(0): np.int64(3)}})
        folder.finish({})
    run = report.read(tmp_path / "run")
    assert run.events == [EVENT]
    assert run.metrics == [METRICS]


def test_lines_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with report.create(tmp_path / "run") as folder:
        folder.append_event(EVENT)
        folder.append_metrics(METRICS)
        assert json.loads((tmp_path / "run" / "events.jsonl").read_text()) == EVENT
        assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == METRICS


def test_the_summary_appears_with_finish_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "run"
    folder = report.create(path)
    folder.append_event(EVENT)
    assert not (path / "summary.json").exists()
    with pytest.raises(RunFolderError, match=r"summary\.json.*has not finished"):
        report.read(path)
    assert folder.finish({}) == path / "summary.json"
    assert report.read(path).events == [EVENT]
    for use in (
        lambda: folder.append_event(EVENT),
        lambda: folder.append_metrics(METRICS),
        lambda: folder.finish({}),
    ):
        with pytest.raises(RunFolderError, match="finished and takes nothing more"):
            use()


def test_a_finish_that_fails_leaves_no_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    folder = report.create(path)
    before = sorted(path.iterdir())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with pytest.raises(RunFolderError, match=r"summary\['bad'\] is a object"):
        folder.finish({"bad": object()})
    with pytest.raises(RunFolderError, match="schema is 7"):
        folder.finish({"schema": 7})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            folder.finish({})
    assert sorted(path.iterdir()) == before
    folder.finish({})
    assert report.read(path).summary == {"schema": 1}


def test_leaving_the_block_finishes_nothing(tmp_path: Path) -> None:
    with report.create(tmp_path / "run") as folder:
        pass
    assert not (tmp_path / "run" / "summary.json").exists()
    with pytest.raises(RunFolderError, match="closed and takes nothing more"):
        folder.append_event(EVENT)


class TestCreateRefuses:
    def test_a_folder_of_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(RunFolderError, match="not empty and holds no run of ours"):
                report.create(tmp_path, overwrite=overwrite)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_run_unless_told_to_replace_it(self, tmp_path: Path) -> None:
        path = finished(tmp_path / "run")
        (path / "report.html").write_text("old")
        (path / "notes.txt").write_text("mine")
        (path / ".summary.json.77.tmp").write_text("half")
        with pytest.raises(RunFolderError, match="overwrite=True"):
            report.create(path)
        assert report.read(path).events == [EVENT]
        report.create(path, overwrite=True).close()
        names = {"esper-run.json", "events.jsonl", "metrics.jsonl", "notes.txt"}
        assert {file.name for file in path.iterdir()} == names
        assert (path / "events.jsonl").read_bytes() == b""

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(RunFolderError, match="is a file; name another folder"):
                report.create(path)

    def test_an_empty_folder_is_fine(self, tmp_path: Path) -> None:
        report.create(tmp_path).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "host"}, "'arm' is 'host'; it must be one of grown, uniform, random"),
        ({"to": "SPROUTED"}, "'to' is 'SPROUTED'; it must be one of DORMANT, GERMINATED"),
        ({"step": -1}, "'step' is -1; it must be an integer of 0 or more"),
        ({"step": True}, "'step' is True"),
        ({"site": None}, "'site' is None; it must be a string"),
        ({"measured": {"a": "b"}}, "'measured' is"),
        ({"measured": {"a": object()}}, r"record\['measured'\]\['a'\] is a object"),
        ({"measured": {(1, 2): 1.0}}, r"has the key \(1, 2\)"),
    ],
)
def test_a_wrong_event_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with report.create(tmp_path / "run") as folder:
        with pytest.raises(RunFolderError, match=message):
            folder.append_event({**EVENT, **change})
        folder.finish({})
    assert report.read(tmp_path / "run").events == []


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with report.create(tmp_path / "run") as folder:
        with pytest.raises(RunFolderError, match="'seed' is missing"):
            folder.append_event({k: v for k, v in EVENT.items() if k != "seed"})
        with pytest.raises(RunFolderError, match="'alpha' is"):
            folder.append_metrics({**METRICS, "alpha": {"first": 0.5}})
        with pytest.raises(RunFolderError, match="nests deeper"):
            folder.append_metrics({**METRICS, "extra": nested(100)})
        folder.append_metrics({"arm": "host", "step": 0})


def nested(depth: int) -> object:
    value: object = None
    for _ in range(depth):
        value = [value]
    return value


class TestReadRefuses:
    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            (b"{not json}\n", "Expecting property name"),
            (b"\n", "Expecting value"),
            (b"[]\n", "expected a mapping, got list"),
            (b'{"arm": "grown"}\n', "'step' is missing"),
            (b'{"x": NaN}\n', "NaN is not JSON"),
            (b'{"x": 1e999}\n', "too large for a float"),
            (b'{"x": "\xff"}\n', "codec can't decode"),
            (b"[" * 200_000 + b"\n", "nests too deeply"),
            (json.dumps(EVENT).encode(), "breaks off"),
        ],
    )
    def test_a_corrupt_line(self, tmp_path: Path, line: bytes, problem: str) -> None:
        path = finished(tmp_path / "run")
        with open(path / "events.jsonl", "ab") as file:
            file.write(line)
        with pytest.raises(RunFolderError, match=rf"events\.jsonl, line 2: .*{problem}") as error:
            report.read(path)
        assert "remove or repair this line" in str(error.value)

    @pytest.mark.parametrize("name", ["summary.json", "events.jsonl", "metrics.jsonl"])
    def test_a_missing_or_odd_file(self, tmp_path: Path, name: str) -> None:
        path = finished(tmp_path / "run")
        (path / name).unlink()
        with pytest.raises(RunFolderError, match=rf"{name}: the file is missing; .*run"):
            report.read(path)
        os.mkfifo(path / name)
        with pytest.raises(RunFolderError, match=rf"{name}: it is not a plain file"):
            report.read(path)

    def test_a_corrupt_summary(self, tmp_path: Path) -> None:
        path = finished(tmp_path / "run")
        (path / "summary.json").write_text('{\n"schema": 1,\n oops}')
        with pytest.raises(RunFolderError, match=r"summary\.json, line 3: .*run again"):
            report.read(path)
        (path / "summary.json").write_text('{"schema": 2}')
        with pytest.raises(RunFolderError, match="schema is 2; this version reads schema 1"):
            report.read(path)

    def test_what_is_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = finished(tmp_path / "run")
        with pytest.raises(RunFolderError, match=r"at most 10 are read; .*max_bytes"):
            report.read(path, max_bytes=10)
        monkeypatch.setattr("esper_fn.report._folder.MAX_LINE_BYTES", 20)
        with pytest.raises(RunFolderError, match=r"line 1: the line is longer than 20 bytes"):
            report.read(path)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RunFolderError, match="there is no such folder"):
            report.read(tmp_path / "nowhere")
