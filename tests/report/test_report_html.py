import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import synthetic, write

from esper_fn import report
from esper_fn.errors import RunFolderError

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>--><!-- ]]> \x00\x1b\ud800"
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment in the page: {data}")

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def html(run: report.Run) -> str:
    return report.render(run)


def test_the_page_needs_nothing_but_itself(html: str) -> None:
    assert re.findall(r"(?:https?:)?//[a-z]", html.replace("http://www.w3.org/2000/svg", "")) == []
    assert "@import" not in html
    assert "@font-face" not in html
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "image",
        "img",
        "base",
        "form",
    }
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"href", "src"}:
                assert value is not None
                assert value.startswith("#"), (tag, name, value)
    for target in re.findall(r"url\(([^)]*)\)", html):
        assert target.startswith("#")


def test_every_reference_finds_its_one_target(html: str) -> None:
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert used
    assert set(used) <= set(ids)


def test_the_page_holds_every_part(html: str) -> None:
    page = Page(html)
    assert sum(tag == "svg" for tag, _ in page.tags) == 8
    assert sum(tag == "figcaption" for tag, _ in page.tags) == 8
    for title in ("The life of every seed", "Training loss", "Where it grew", "What it cost"):
        assert title in page.text
    assert "whose output does not change by a single bit." in page.text
    assert "gate:contribution_held" in page.text
    assert "stability not measured" in page.text
    assert "13.1 GFLOP" in page.text
    assert "0.10.2" in page.text
    assert re.search(r"91.1.% to 91.7.%", page.text)


def test_colours_follow_light_and_dark(html: str) -> None:
    assert "@media(prefers-color-scheme:dark)" in html
    assert "\nbody{margin:0;background:var(--paper)" in html
    assert "var(--stage-FOSSILIZED)" in html
    page = html[html.index("</style>") :]
    assert re.findall(r"(?:fill|stroke): #(?!0{6})[0-9a-f]{6}", page) == []


def test_the_same_run_gives_the_same_page(html: str, run: report.Run) -> None:
    assert report.render(run) == html


def hostile(value: Any) -> Any:
    keep = {"grown", "random", "host", "static"}
    if isinstance(value, str):
        return value if value in keep or value.isupper() else EVIL
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value


def test_hostile_strings_are_shown_and_not_obeyed(run: report.Run, tmp_path: Path) -> None:
    events = [hostile({**event, "measured": {EVIL: 1.0}}) for event in run.events]
    summary = {**hostile(run.summary), EVIL: EVIL, "versions": {EVIL: EVIL}}
    summary["task"] = "classification"
    path = write(report.Run(summary=summary, events=events, metrics=run.metrics), tmp_path / "run")
    html = report.write_report(path).read_text(encoding="utf-8")
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>" in page.text
    assert "\x00" not in html
    assert "\x1b" not in html


def test_bare_runs_are_reported(bare_run: report.Run) -> None:
    page = Page(report.render(bare_run))
    assert "cannot compare growth with a static network of equal size" in page.text
    assert "No seed changed its stage in this run." in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize("value", [None, "many", [1], {"host": "x"}, True, 10**400, -1])
def test_odd_values_in_the_summary_are_no_accident(run: report.Run, value: object) -> None:
    summary = dict.fromkeys(run.summary, value)
    Page(report.render(report.Run(summary=summary, events=run.events[:20], metrics=[])))
    nested = {
        **run.summary,
        "repeats": {"count": value, "rows": value, "intervals": {"grown_accuracy": value}},
        "train_flops": {"host": 0, "grown": value, "static": 0.0},
        "versions": {"jax": value},
    }
    Page(report.render(report.Run(summary=nested, events=[], metrics=[])))


def sentences(**summary: Any) -> str:
    run = report.Run(summary={"schema": 1, **summary}, events=[], metrics=[])
    return Page(report.render(run)).text


def interval(mean: float, low: float, high: float) -> dict[str, Any]:
    spread = {"mean": mean, "low": low, "high": high}
    return {
        "count": 10,
        "rows": [],
        "intervals": {
            "grown_accuracy": {"mean": 0.9, "low": 0.89, "high": 0.91},
            "grown_minus_static": spread,
        },
    }


def test_the_verdict_is_honest() -> None:
    scores = {"grown_accuracy": 0.90, "static_equal_params_accuracy": 0.92}
    assert "ends 2.0 percentage points below a static network of equal size" in sentences(**scores)
    assert "These are single runs" in sentences(**scores)
    scores["static_equal_params_accuracy"] = 0.9001
    assert "equals a static network of equal size" in sentences(**scores)
    assert "is worse than a static network of equal size by 2.0 percentage points" in sentences(
        repeats=interval(-0.02, -0.03, -0.01)
    )
    assert "is better than a static network" in sentences(repeats=interval(0.02, 0.01, 0.03))
    assert "cannot be told apart" in sentences(repeats=interval(0.02, -0.01, 0.03))
    assert "differ in size" in sentences(grown_params=100, static_params=120)
    assert "1.50 times the FLOPs" in sentences(train_flops={"grown": 3e9, "static": 2e9})


def test_language_models_have_their_own_word_for_accuracy() -> None:
    text = Page(report.render(synthetic(8, 2, repeats=0, task="language_model"))).text
    assert "Final next-character accuracy" in text
    assert "held-out accuracy" not in text


def test_long_event_tables_are_cut_and_counted(large_run: report.Run) -> None:
    page = Page(report.render(large_run))
    total = f"{len(large_run.events):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    assert f"The first 500 of {total} events" in "".join(page.words)
    assert sum(word.startswith(("gate:", "policy:")) for word in page.words) <= 500


def test_write_report_writes_into_the_folder(run: report.Run, tmp_path: Path) -> None:
    path = write(run, tmp_path / "run")
    target = report.write_report(str(path))
    assert target == path / "report.html"
    assert report.write_report(path).read_text(encoding="utf-8") == report.render(run)
    assert not [file for file in path.iterdir() if file.suffix == ".tmp"]
    with pytest.raises(RunFolderError, match="no such folder"):
        report.write_report(tmp_path / "nowhere")
