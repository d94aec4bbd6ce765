"""Draws seeds: the stages they passed, how they were grafted, and where they stayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from esper_fn.report._folder import Run
from esper_fn.report._format import MINUS, count, short_names
from esper_fn.report._series import History, Ramp, events_of, histories, last_step, ramps
from esper_fn.report._style import (
    ARM_COLOR,
    INK,
    LINE,
    MUTED,
    PAPER,
    SMALL_POINTS,
    TEXT_POINTS,
    TITLE_INCHES,
    Key,
    canvas,
    empty,
    legend,
    legend_height,
    note,
    plain_ticks,
    step_axis,
    styled,
)
from esper_fn.report._words import ARM_LABEL, STAGES, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS: Final = 64
MAX_RAMPS: Final = 200
_GROUP_GAP: Final = 0.7  # rows of empty space between two sites
_MARGIN_INCHES: Final = 1.95

_KEPT: Final = STAGES["FOSSILIZED"].color
_REMOVED: Final = STAGES["CULLED"].color
_OPEN: Final = STAGES["EVALUATING"].color


@styled
def stage_map(run: Run, *, arm: str = "grown") -> Figure:
    """Draws the stage of every seed over time: one row a seed, grouped by site.

    Only seeds that ever left DORMANT get a row, at most `MAX_ROWS` of them, evenly spaced in the
    order of sites and seeds, so that failures show as often as they happened; the figure says how
    many it leaves out.

    Args:
      run: the run to draw.
      arm: "grown", "uniform" or "random".

    Returns:
      A figure with one collection of bars for each stage that occurs.
    """
    title = "The life of every seed" if arm == "grown" else f"The life of every seed: {arm} growth"
    seeds = histories(run, arm)
    if not seeds:
        return empty(title, "No seed left DORMANT in this run.")
    drawn = _choose(seeds)
    rows, span = _rows(drawn)
    row_inches = min(0.24, max(0.118, 5.4 / span))
    stages = [stage for stage in STAGES if any(s.stage == stage for h in drawn for s in h.stays)]
    keys = [Key("s", STAGES[stage].color, STAGES[stage].label) for stage in stages]
    top = 0.8 + legend_height(keys)
    notes = _left_out(run, seeds, drawn)
    sheet = canvas(top + span * row_inches + 0.52 + 0.17 * len(notes), title, _subtitle(seeds))
    legend(sheet, keys, 0.66)
    axes = sheet.axes(_MARGIN_INCHES, top, sheet.width - _MARGIN_INCHES - 0.35, span * row_inches)
    _draw_rows(axes, drawn, rows)
    axes.set_ylim(span - 0.5, -0.5)
    axes.set_yticks([])
    step_axis(axes, last_step(run))
    _label_rows(axes, drawn, rows, row_inches)
    for i, line in enumerate(reversed(notes)):
        top = sheet.height - 0.08 - 0.17 * i
        sheet.text(TITLE_INCHES, top, line, fontsize=SMALL_POINTS, color=MUTED, va="bottom")
    return sheet.figure


def _choose(seeds: list[History]) -> list[History]:
    """Chooses at most `MAX_ROWS` seeds, evenly spaced, so that every site gets its share."""
    if len(seeds) <= MAX_ROWS:
        return seeds
    return [seeds[i * len(seeds) // MAX_ROWS] for i in range(MAX_ROWS)]


def _rows(drawn: list[History]) -> tuple[list[float], float]:
    """Returns the y of each row, and the height of all of them, both in rows."""
    rows: list[float] = []
    y = 0.0
    for i, history in enumerate(drawn):
        if i and history.site != drawn[i - 1].site:
            y += _GROUP_GAP
        rows.append(y)
        y += 1.0
    return rows, y


def _draw_rows(axes: Any, drawn: list[History], rows: list[float]) -> None:
    from matplotlib.collections import PolyCollection

    bars: dict[str, list[list[tuple[float, float]]]] = {}
    for history, y in zip(drawn, rows, strict=True):
        for stay in history.stays:
            half = 0.07 if stay.stage == "DORMANT" else 0.38
            x0, x1 = float(stay.start), float(stay.end)
            corners = [(x0, y - half), (x1, y - half), (x1, y + half), (x0, y + half)]
            bars.setdefault(stay.stage, []).append(corners)
    for stage in STAGES:
        if stage in bars:
            color = STAGES[stage].color
            # The edge keeps a stay of a few steps visible in a run of many thousands.
            axes.add_collection(
                PolyCollection(
                    bars[stage], facecolor=color, edgecolor=color, linewidth=0.4, label=stage
                ),
                autolim=False,
            )


def _label_rows(axes: Any, drawn: list[History], rows: list[float], row_inches: float) -> None:
    small = min(7.5, row_inches * 72 * 0.8)
    sites = [h.site for h in drawn]
    names = short_names(dict.fromkeys(sites), limit=18)
    for i, (history, y) in enumerate(zip(drawn, rows, strict=True)):
        note(axes, f"#{history.seed}", (0, y), (-6, 0), ha="right", fontsize=small)
        if i == 0 or sites[i - 1] != history.site:
            offset = (-72 * (_MARGIN_INCHES - TITLE_INCHES), 0)
            look = {"ha": "left", "color": INK, "fontsize": 8.5, "fontweight": "bold"}
            note(axes, names[history.site], (0, y), offset, annotation_clip=False, **look)


def _subtitle(seeds: list[History]) -> str:
    fossils = sum(h.is_fossil for h in seeds)
    sites = len({h.site for h in seeds})
    return (
        f"{_seeds(len(seeds))} at {sites} {'site' if sites == 1 else 'sites'} left DORMANT;"
        f" {fossils} ended as a permanent part of the network."
    )


def _left_out(run: Run, seeds: list[History], drawn: list[History]) -> list[str]:
    notes = []
    if len(drawn) < len(seeds):
        hidden = len(seeds) - len(drawn)
        fossils = sum(h.is_fossil for h in seeds) - sum(h.is_fossil for h in drawn)
        notes.append(
            f"Drawn: {len(drawn)} of these {_seeds(len(seeds))}, evenly spaced."
            f" Left out: {_seeds(hidden)}, {fossils} of them fossilized."
        )
    total = number(run.summary, "seeds_total")
    if total is not None and total >= len(seeds):
        notes.append(f"Not drawn: {_seeds(int(total) - len(seeds))} that never left DORMANT.")
    return notes


def _seeds(num: int) -> str:
    return f"{count(num)} {'seed' if num == 1 else 'seeds'}"


@styled
def alpha_curves(run: Run, *, arm: str = "grown") -> Figure:
    """Draws alpha, the share with which each adapter acts, over time; coloured by its fate.

    Args:
      run: the run to draw.
      arm: "grown", "uniform" or "random".

    Returns:
      A figure with one line for each life of an adapter, at most `MAX_RAMPS` of them.
    """
    title = "How adapters were grafted"
    lives = ramps(run, arm)
    if not lives:
        return empty(title, f"No adapter was recorded in the {ARM_LABEL.get(arm, arm)} run.")
    drawn = lives if len(lives) <= MAX_RAMPS else lives[:: -(-len(lives) // MAX_RAMPS)]
    subtitle = (
        "Alpha of every adapter until its fate was decided: 0 has no effect, 1 has its full effect."
    )
    if len(drawn) < len(lives):
        subtitle += f" {len(drawn)} of {len(lives)} adapters are drawn."
    sheet = canvas(3.7, title, subtitle)
    legend(sheet, _fate_keys(lives), 0.66)
    axes = sheet.axes(0.55, 1.05, sheet.width - 0.9, 2.12)
    for ramp in drawn:
        _draw_ramp(axes, ramp, is_crowded=len(drawn) > 40)
    axes.set_ylim(-0.04, 1.06)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    plain_ticks(axes.yaxis, lambda value: f"{value:g}")
    step_axis(axes, last_step(run))
    return sheet.figure


def _fate_keys(lives: list[Ramp]) -> list[Key]:
    fossils = sum(ramp.fate == "FOSSILIZED" for ramp in lives)
    undecided = sum(ramp.fate is None for ramp in lives)
    keys = [
        Key("D", _KEPT, f"kept: fossilized ({fossils})"),
        Key("x", _REMOVED, f"removed again ({len(lives) - fossils - undecided})"),
        Key("-", _OPEN, f"undecided at the end ({undecided})"),
    ]
    return [key for key in keys if not key.words.endswith("(0)")]


def _draw_ramp(axes: Any, ramp: Ramp, *, is_crowded: bool) -> None:
    color = {None: _OPEN, "FOSSILIZED": _KEPT}.get(ramp.fate, _REMOVED)
    end = ramp.steps[-1] if ramp.fate_step is None else ramp.fate_step
    is_open = ramp.steps <= end
    axes.plot(
        ramp.steps[is_open],
        ramp.alpha[is_open],
        color=color,
        linewidth=0.9 if is_crowded else 1.4,
        alpha=0.5 if is_crowded else 0.8,
    )
    if ramp.fate_step is None:
        return
    lived = ramp.alpha[ramp.steps <= ramp.fate_step]
    height = float(lived[-1]) if lived.size else float(ramp.alpha[0])
    is_kept = ramp.fate == "FOSSILIZED"
    axes.plot(
        [ramp.fate_step],
        [height],
        linestyle="none",
        marker="D" if is_kept else "x",
        markersize=6.5 if is_kept else 6,
        markeredgewidth=0.8 if is_kept else 1.7,
        markeredgecolor=PAPER if is_kept else color,
        color=color,
        clip_on=False,
        zorder=4 if is_kept else 5,
    )


@styled
def where_it_grew(run: Run, *, arm: str = "grown") -> Figure | None:
    """Draws, for each site, the growth potential that was measured there and the seeds it kept.

    The potential is the mean of `measured["potential"]` over the germinations of a site.

    Args:
      run: the run to draw.
      arm: "grown", "uniform" or "random".

    Returns:
      A figure with one bar a site on each side, or None when no germination measured a potential.
    """
    potentials: dict[str, list[float]] = {}
    tried: dict[str, set[int]] = {}
    for event in events_of(run, arm):
        if event["to"] == "GERMINATED":
            tried.setdefault(event["site"], set()).add(event["seed"])
            potential = number(event, "measured", "potential")
            if potential is not None:
                potentials.setdefault(event["site"], []).append(potential)
    if not potentials:
        return None
    means = {site: sum(values) / len(values) for site, values in potentials.items()}
    sites = sorted(tried, key=lambda site: -means.get(site, float("-inf")))
    fossils = dict.fromkeys(sites, 0)
    for history in histories(run, arm):
        if history.site in fossils and history.is_fossil:
            fossils[history.site] += 1
    height = max(0.6, 0.3 * len(sites))
    sheet = canvas(
        height + 1.12,
        "Where it grew",
        "Left: the growth potential measured when seeds germinated. Right: what stayed there.",
    )
    half = (sheet.width - _MARGIN_INCHES - 0.5) / 2
    left = sheet.axes(_MARGIN_INCHES, 1.0, half - 0.3, height)
    right = sheet.axes(_MARGIN_INCHES + half, 1.0, half, height)
    sheet.text(_MARGIN_INCHES, 0.94, "mean potential", color=MUTED, va="bottom")
    sheet.text(_MARGIN_INCHES + half, 0.94, "seeds kept of those tried", color=MUTED, va="bottom")
    _site_bars(left, [means.get(site, 0.0) for site in sites], ARM_COLOR["grown"])
    _site_bars(right, [len(tried[site]) for site in sites], LINE)
    _site_bars(right, [fossils[site] for site in sites], _KEPT)
    names = short_names(sites, limit=22)
    for y, site in enumerate(sites):
        note(left, names[site], (0, y), (-8, 0), ha="right", color=INK, fontsize=TEXT_POINTS)
        mean = f"{means[site]:.3g}".replace("-", MINUS) if site in means else "not measured"
        point = (max(means.get(site, 0.0), 0.0), y)
        note(left, mean, point, (5, 0), "data", fontsize=TEXT_POINTS)
        share = f"{fossils[site]} of {len(tried[site])}"
        note(right, share, (len(tried[site]), y), (5, 0), "data", fontsize=TEXT_POINTS)
    return sheet.figure


def _site_bars(axes: Any, values: list[float] | list[int], color: str) -> None:
    axes.barh(range(len(values)), values, height=0.62, color=color)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    largest = max(*values, 0)
    axes.set_xlim(min(0, *values), 1.18 * largest if largest > 0 else 1.0)
