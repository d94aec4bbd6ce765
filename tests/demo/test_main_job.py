"""The main job: `esper grow --data digits`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esper_fn import cli, report
from esper_fn.demo import data, hosts, jobs
from esper_fn.demo.jobs import _jobs

PROMISED = (
    "host_accuracy",
    "grown_accuracy",
    "static_equal_params_accuracy",
    "uniform_growth_accuracy",
    "random_growth_accuracy",
    "host_params",
    "grown_params",
    "seeds_total",
    "seeds_fossilized",
    "seeds_culled",
    "recompilations_after_first_step",
    "steps",
    "wall_seconds",
    "train_flops",
)


Finished = tuple[Path, report.Run]
NARROW = {"layer2.0", "layer2.1", "layer2.2"}


def small_host(dataset: data.Dataset) -> hosts.Host:
    return hosts.mlp((64, 32, 2, 32, dataset.num_classes), spans=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The main job with three sites and as many steps as its adapters need to be fossilized."""
    folder = tmp_path_factory.mktemp("small") / "run"
    small = replace(jobs.get("digits"), host=small_host, germinations=2, capacity=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_jobs._JOBS, "digits", small)
        assert cli.main(["grow", "--data", "digits", "--steps", "200", "--out", str(folder)]) == 0
    return folder, report.read(folder)


@pytest.fixture(scope="module")
def main_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("main") / "run"
    assert cli.main(["grow", "--data", "digits", "--out", str(folder)]) == 0
    return folder, report.read(folder)


@pytest.fixture(params=["run", pytest.param("main_run", marks=pytest.mark.slow)])
def any_run(request: pytest.FixtureRequest) -> Finished:
    finished: Finished = request.getfixturevalue(request.param)
    return finished


def test_the_summary_holds_what_is_promised(any_run: Finished) -> None:
    summary = any_run[1].summary
    assert [name for name in PROMISED if name not in summary] == []
    assert set(summary["train_flops"]) == {"host", "grown", "uniform", "random", "static"}
    assert summary["host_params"] < summary["grown_params"]
    assert abs(summary["static_params"] / summary["grown_params"] - 1) < 0.05


def test_seeds_grow_at_once_and_are_kept_through_measured_gates(
    any_run: Finished,
) -> None:
    events = [event for event in any_run[1].events if event["arm"] == "grown"]
    assert any_run[1].summary["seeds_fossilized"] >= 1
    assert next(e["step"] for e in events if e["to"] == "GERMINATED") <= 1
    assert not [event for event in events if event["cause"] == "command"]
    for event in events:
        if event["to"] == "FOSSILIZED":
            assert event["cause"] == "gate:contribution_high"
            assert event["measured"]["contribution"] > 0


def test_nothing_recompiles(any_run: Finished) -> None:
    assert any_run[1].summary["recompilations_after_first_step"] == 0


@pytest.mark.slow
def test_growth_finds_the_narrow_layer(main_run: Finished) -> None:
    grown = [e for e in main_run[1].events if e["arm"] == "grown"]
    germinated = [e for e in grown if e["to"] == "GERMINATED"]
    assert {e["site"] for e in germinated if e["step"] <= 1} >= NARROW
    potential = {e["site"]: e["measured"]["potential"] for e in germinated}
    assert min(potential[site] for site in NARROW) == max(potential.values())
    worth = {e["site"]: e["measured"]["contribution"] for e in grown if e["to"] == "FOSSILIZED"}
    assert worth.keys() >= NARROW
    assert all(worth[site] < min(worth[name] for name in NARROW) for site in worth.keys() - NARROW)


def test_the_folder_is_complete_and_the_page_needs_no_network(
    any_run: Finished,
) -> None:
    folder, _ = any_run
    assert {"summary.json", "events.jsonl", "metrics.jsonl", "report.html"} <= {
        path.name for path in folder.iterdir()
    }
    page = (folder / "report.html").read_text()
    assert "src=" not in page
    assert "<svg" in page


def test_growth_repairs_the_host(any_run: Finished) -> None:
    summary = any_run[1].summary
    assert summary["grown_accuracy"] > summary["host_accuracy"] + 0.02


@pytest.mark.slow
def test_growth_loses_little_to_a_network_that_had_the_right_shape(main_run: Finished) -> None:
    summary = main_run[1].summary
    assert summary["grown_accuracy"] > summary["static_equal_params_accuracy"] - 0.02


def test_the_arms_saw_the_same_steps(any_run: Finished) -> None:
    metrics = any_run[1].metrics
    assert {row["step"] for row in metrics if row["arm"] == "static"} == {
        row["step"] for row in metrics if row["arm"] == "random"
    }


def test_an_earlier_run_is_not_overwritten(
    run: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    before = (folder / "summary.json").read_bytes()
    assert cli.main(["grow", "--out", str(folder)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "summary.json").read_bytes() == before


def test_report_command_renders_again(run: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run[0])]) == 0
    assert "report.html" in capsys.readouterr().out


def test_intervals_against_a_hand_computation() -> None:
    rows: list[dict[str, Any]] = [
        {
            "host_accuracy": a,
            "grown_accuracy": a + 0.1,
            "uniform_growth_accuracy": a,
            "random_growth_accuracy": a,
            "static_equal_params_accuracy": a,
        }
        for a in (0.1, 0.2, 0.3)
    ]
    intervals = jobs.intervals(rows)
    # mean 0.2, deviation 0.1, t(2) = 4.303: half width 4.303 * 0.1 / sqrt(3)
    assert intervals["host_accuracy"]["mean"] == pytest.approx(0.2)
    assert intervals["host_accuracy"]["high"] - 0.2 == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert intervals["grown_minus_host"]["low"] == pytest.approx(0.1)


def test_the_static_rival_has_about_as_many_parameters() -> None:
    job, digits = jobs.get("digits"), data.load("digits")
    for count in (1000, 5000, 50000):
        host = jobs.static_host(job, digits, count)
        assert abs(hosts.count_parameters(host) / count - 1) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_over_ten_seeds_growth_beats_the_host_and_chance(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli.main(["grow", "--data", "digits", "--repeat", "10", "--out", str(folder)]) == 0
    repeats = json.loads((folder / "summary.json").read_text())["repeats"]
    assert repeats["count"] == 10
    assert repeats["intervals"]["grown_minus_host"]["low"] > 0
    assert repeats["intervals"]["grown_minus_random"]["low"] > 0
    assert repeats["intervals"]["grown_minus_static"]["mean"] > -0.005
