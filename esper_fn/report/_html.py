"""Writes the report of a run: one page that needs nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from esper_fn.report import _tables as tables
from esper_fn.report import figures
from esper_fn.report._bars import num_repeats, scores
from esper_fn.report._css import CSS
from esper_fn.report._folder import REPORT, Run, read, write_atomically
from esper_fn.report._format import count
from esper_fn.report._svg import css_variables, to_svg
from esper_fn.report._verdict import verdict
from esper_fn.report._words import accuracy_name, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Even a string that slipped through unescaped could load and run nothing.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_BASELINES: Final = "How far each way of training came; the right side shows what growth changed."
_STAGES: Final = (
    "One row is one seed, read from left to right: a bar changes its colour when the seed changes"
    " its stage."
)
_ACCURACY: Final = "Accuracy on data that no arm trained on; the marks show when seeds moved."
_LOSS: Final = "Loss on the training batches; the marks below show when seeds moved."
_HELD_OUT_LOSS: Final = "Loss on data that no arm trained on; the marks show when seeds moved."
_ALPHA: Final = "Each line is one adapter: it is grafted, measured, and then kept or removed."
_PARAMETERS: Final = (
    "Growth pays for parameters only once they exist; removed adapters give theirs back."
)
_SITES: Final = "Whether seeds stayed where the measured potential promised most."


def render(run: Run) -> str:
    """Writes the report of a run as one self-contained HTML page: inline SVG and CSS, no script.

    Args:
      run: from `read`.

    Returns:
      The page.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    title = f"{_setting(run, 'data')} · {_setting(run, 'host')}"
    sentences = "".join(f"<p>{tables.safe(sentence)}</p>" for sentence in verdict(run))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Esper-fn: {title}</title>
<style>{css_variables()}{CSS}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="lede">{_lede(run)}</p>
<div class="cards">{tables.cards(run)}</div>
<ul class="facts">{tables.facts(run)}</ul>
<div class="verdict">{sentences}</div>
{_figures(run)}
<h2>The stages of a seed</h2>
<p>A seed is a growth point of the host: a small network, its adapter, can grow there. It moves
through these stages; rules measured during training decide each step.</p>
<div class="wide">{tables.stage_table(run)}</div>
<h2>What happened</h2>
{tables.event_table(run)}
{tables.rollback_section(run)}<h2>What it cost</h2>
<div class="wide">{tables.cost_table(run)}</div>
<div class="columns">
<section><h2>Settings</h2>{tables.settings_table(run)}</section>
<section><h2>Versions</h2>{tables.versions_table(run)}</section>
</div>
<footer>Made by Esper-fn from <code>summary.json</code>, <code>events.jsonl</code> and
<code>metrics.jsonl</code> in this folder.</footer>
</main>
</body>
</html>
"""


def write_report(path: str | os.PathLike[str]) -> Path:
    """Reads a finished run and writes its `report.html`.

    Args:
      path: the run folder.

    Returns:
      The path of the page.

    Raises:
      RunFolderError: the folder does not hold a finished run.
      ModuleNotFoundError: matplotlib is not installed.
    """
    target = Path(path) / REPORT
    write_atomically(target, render(read(path)))
    return target


def _setting(run: Run, key: str) -> str:
    value = run.summary.get(key)
    return f"unnamed {key}" if value is None else tables.safe(value)


def _lede(run: Run) -> str:
    parts = [f"Final {accuracy_name(run.summary)}"]
    steps = number(run.summary, "steps")
    if steps is not None:
        parts.append(f"{count(steps)} training steps")
    repeats = num_repeats(run)
    if repeats:
        parts.append(f"means of {count(repeats)} repeats")
    parts += [
        f"{key} {tables.safe(run.summary[key])}"
        for key in ("policy", "device")
        if run.summary.get(key) is not None
    ]
    return " · ".join(parts)


def _figures(run: Run) -> str:
    """Draws the figures that have something to show, each with its caption."""
    has = {
        key: any(number(record, key) is not None for record in run.metrics)
        for key in ("test_accuracy", "loss", "test_loss", "parameters")
    }
    moved = any(event["arm"] == "grown" for event in run.events)
    acted = any(record["arm"] == "grown" and record.get("alpha") for record in run.metrics)
    drawn = [
        _figure(run, name, draw, caption)
        for name, is_known, draw, caption in (
            ("baselines", bool(scores(run)), figures.baseline_bars, _BASELINES),
            ("stages", moved, figures.stage_map, _STAGES),
            ("accuracy", has["test_accuracy"], figures.accuracy_curves, _ACCURACY),
            ("loss", has["loss"], figures.loss_curves, _LOSS),
            ("held-out-loss", has["test_loss"], _held_out_loss, _HELD_OUT_LOSS),
            ("alpha", acted, figures.alpha_curves, _ALPHA),
            ("parameters", has["parameters"], figures.parameters_over_time, _PARAMETERS),
            ("sites", moved, figures.where_it_grew, _SITES),
        )
        if is_known
    ]
    return "\n".join(drawn)


def _held_out_loss(run: Run) -> Figure:
    return figures.loss_curves(run, is_held_out=True)


def _figure(run: Run, name: str, draw: Callable[[Run], Figure | None], caption: str) -> str:
    figure = draw(run)
    if figure is None:
        return ""
    svg = to_svg(figure, name, caption)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
