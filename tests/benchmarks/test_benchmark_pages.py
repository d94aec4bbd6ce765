"""The pages of `docs/benchmarks` are what the records and the targets say."""

from __future__ import annotations

from pathlib import Path

from benchmarks._pages import render_pages
from benchmarks._records import append_record, describe_run
from benchmarks._runner import BENCHMARKS, PAGES, RESULTS, TARGETS
from benchmarks._timing import Row, exact


def test_committed_pages_are_up_to_date() -> None:
    pages = render_pages(list(BENCHMARKS), results=RESULTS, targets=TARGETS)
    written = {file.name: file.read_text() for file in PAGES.glob("*.md")}
    assert written == pages, "run `python -m benchmarks pages` and commit docs/benchmarks"


def test_a_page_shows_figures_targets_and_what_is_missing(tmp_path: Path) -> None:
    targets = tmp_path / "targets.toml"
    line = 'unit = "ratio"\nstatistic = "median"\nsource = "a promise"\n'
    targets.write_text(
        f"[speed.step]\nat_most = 1.5\n{line}[speed.load]\nat_most = 2\n{line}"
        f"[speed.other]\nat_most = 1\n{line}"
    )
    rows = {
        "step": Row(median=1.25, low=1.0, high=1.5, unit="ratio", count=9),
        "load": exact(3, "ratio"),
    }
    record = describe_run("speed", rows=rows, command="speed run", quick=False, root=tmp_path)
    append_record(tmp_path / "speed.jsonl", record)
    short = describe_run("speed", rows=rows, command="speed run", quick=True, root=tmp_path)
    append_record(tmp_path / "speed.jsonl", short)

    pages = render_pages(["speed", "never_run"], results=tmp_path, targets=targets)

    assert set(pages) == {"index.md", "speed.md"}
    assert "| [speed](speed.md) | 1 of 3 |" in pages["index.md"]
    assert "| step | 1.25 | 1 to 1.5 | ratio | 9 | at most 1.5 | met |" in pages["speed.md"]
    assert "| load | 3 |  | ratio | 1 | at most 2 | missed |" in pages["speed.md"]
    assert "- `other`: median at most 1 ratio" in pages["speed.md"]
    assert pages["speed.md"].count("## ") == 2  # the quick record has no section of its own
