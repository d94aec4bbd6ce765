"""Draws the comparison: final accuracy of every arm, and what growth changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from esper_fn.report._folder import Run
from esper_fn.report._format import percent, percent_tick, points, points_tick
from esper_fn.report._style import (
    ARM_COLOR,
    INK,
    LINE,
    MUTED,
    PAPER,
    SMALL_POINTS,
    TEXT_POINTS,
    Canvas,
    canvas,
    empty,
    name_x,
    note,
    plain_ticks,
    styled,
)
from esper_fn.report._words import (
    ACCURACY_KEY,
    ARM_LABEL,
    ARMS,
    DIFFERENCE_KEY,
    Interval,
    accuracy_name,
    interval,
    number,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW_INCHES: Final = 0.46
_TOP_INCHES: Final = 0.98
_LEFT_INCHES: Final = 1.5


class Score(NamedTuple):
    """The final accuracy of an arm: the mean of its repeats with the interval, or of one run."""

    arm: str
    value: float
    interval: Interval | None
    repeats: tuple[float, ...]


def scores(run: Run) -> list[Score]:
    """Returns the final accuracy of every arm that has one, in the order of `ARMS`."""
    rows = _repeat_rows(run)
    result = []
    for arm in ARMS:
        key = ACCURACY_KEY[arm]
        spread = interval(run.summary, key)
        value = number(run.summary, key) if spread is None else spread.mean
        if value is not None:
            each = tuple(v for row in rows if (v := number(row, key)) is not None)
            result.append(Score(arm, value, spread, each))
    return result


def differences(run: Run) -> list[Score]:
    """Returns grown minus every other arm, from the paired repeats or else from this one run."""
    rows = _repeat_rows(run)
    grown_key = ACCURACY_KEY["grown"]
    result = []
    for arm, key in DIFFERENCE_KEY.items():
        spread = interval(run.summary, key)
        grown, rival = (number(run.summary, k) for k in (grown_key, ACCURACY_KEY[arm]))
        each = tuple(
            a - b
            for row in rows
            if (a := number(row, grown_key)) is not None
            and (b := number(row, ACCURACY_KEY[arm])) is not None
        )
        if spread is not None:
            result.append(Score(arm, spread.mean, spread, each))
        elif grown is not None and rival is not None:
            result.append(Score(arm, grown - rival, None, each))
    return result


def num_repeats(run: Run) -> int:
    """Counts the repeats behind the intervals; 0 for a single run."""
    if not _is_repeated(run):
        return 0
    declared = number(run.summary, "repeats", "count")
    return len(_repeat_rows(run)) if declared is None else int(declared)


def _is_repeated(run: Run) -> bool:
    return any(interval(run.summary, key) is not None for key in ACCURACY_KEY.values())


def _repeat_rows(run: Run) -> list[dict[str, Any]]:
    repeats = run.summary.get("repeats")
    rows = repeats.get("rows") if isinstance(repeats, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


@styled
def baseline_bars(run: Run) -> Figure:
    """Draws the final accuracy of every arm as bars from zero, and grown minus each rival.

    With repeats, bars are means; 95 % intervals and the single repeats are drawn over them, and
    differences are paired by repeat.

    Args:
      run: the run to draw.
    """
    name = accuracy_name(run.summary)
    title = f"Final {name}"
    arms = scores(run)
    if not arms:
        return empty(title, "No accuracy was recorded in this run.")
    repeats = num_repeats(run)
    subtitle = (
        f"Means of {repeats} repeats with their 95 % intervals; dots are single repeats, paired"
        " by seed."
        if repeats
        else "One run each: without repeats, small differences may be luck."
    )
    height = _ROW_INCHES * len(arms)
    sheet = canvas(_TOP_INCHES + height + 0.55, title, subtitle)
    against = differences(run)
    words_width = 1.42 if repeats else 0.75
    bar_width = (4.75 if against else 8.4) - words_width
    axes = sheet.axes(_LEFT_INCHES, _TOP_INCHES, bar_width, height)
    _draw_scores(axes, arms)
    if against:
        _head(sheet, _LEFT_INCHES, name)
        left = _LEFT_INCHES + bar_width + words_width + 0.25
        _head(sheet, left, "grown minus rival, in percentage points")
        width = sheet.width - left - words_width - 0.05
        _draw_differences(sheet.axes(left, _TOP_INCHES, width, height), arms, against)
    return sheet.figure


def _head(sheet: Canvas, left: float, words: str) -> None:
    sheet.text(left, _TOP_INCHES - 0.08, words, color=MUTED, va="bottom", fontsize=SMALL_POINTS)


def _draw_scores(axes: Any, arms: list[Score]) -> None:
    for y, score in enumerate(arms):
        is_hero = score.arm == "grown"
        color = ARM_COLOR[score.arm]
        axes.barh(y, score.value, height=0.58, color=color, alpha=1.0 if is_hero else 0.55)
        if score.interval is not None:
            _whisker(axes, score.interval, y, INK, width=1.1)
        _row_name(axes, y, ARM_LABEL[score.arm], is_hero=is_hero)
        ends = score.interval and tuple(f"{100 * end:.1f}" for end in score.interval[1:])
        _row_value(axes, y, percent(score.value), ends, is_hero=is_hero)
    largest = max(s.value if s.interval is None else s.interval.high for s in arms)
    axes.set_xlim(0, max(1e-9, 1.02 * largest))
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_yticks([])
    _few_ticks(axes)
    plain_ticks(axes.xaxis, percent_tick)


def _draw_differences(axes: Any, arms: list[Score], against: list[Score]) -> None:
    rows = {score.arm: y for y, score in enumerate(arms)}
    rivals = [score for score in against if score.arm in rows]
    values = [0.0]
    for score in rivals:
        y = rows[score.arm]
        color = ARM_COLOR[score.arm]
        if score.interval is not None:
            if score.repeats:
                _dots(axes, score.repeats, y, color)
            _whisker(axes, score.interval, y, color, width=1.8)
            values.extend((score.interval.low, score.interval.high, *score.repeats))
        values.append(score.value)
        look = {"markeredgecolor": PAPER, "markeredgewidth": 1, "zorder": 4}
        axes.plot([score.value], [y], "o", color=color, markersize=7, **look)
        ends = score.interval and tuple(points(end) for end in score.interval[1:])
        _row_value(axes, y, points(score.value), ends)
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.01
    axes.axvline(0, color=LINE, linewidth=1.2, zorder=1)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_yticks([])
    _few_ticks(axes)
    plain_ticks(axes.xaxis, points_tick)
    name_x(axes, "grown is better →")


def _few_ticks(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))


def _row_name(axes: Any, y: float, words: str, *, is_hero: bool) -> None:
    weight = "bold" if is_hero else "normal"
    look = {"ha": "right", "color": INK, "fontsize": TEXT_POINTS, "fontweight": weight}
    note(axes, words, (0, y), (-8, 0), **look)


def _row_value(
    axes: Any, y: float, words: str, ends: tuple[str, ...] | None, *, is_hero: bool = False
) -> None:
    weight = "bold" if is_hero else "normal"
    note(axes, words, (1, y), (8, 0), color=INK, fontsize=TEXT_POINTS, fontweight=weight)
    if ends:
        note(axes, "\N{THIN SPACE}to\N{THIN SPACE}".join(ends), (1, y), (50, 0))


def _dots(axes: Any, values: tuple[float, ...], y: float, color: str) -> None:
    # Spread vertically in a fixed pattern, so that equal values stay countable.
    offsets = 0.17 * np.sin(2.4 * np.arange(len(values)))
    look = {"markeredgecolor": PAPER, "markeredgewidth": 0.5, "alpha": 0.75, "zorder": 3}
    axes.plot(values, y + offsets, "o", color=color, markersize=3.2, **look)


def _whisker(axes: Any, spread: Interval, y: float, color: str, *, width: float) -> None:
    axes.plot([spread.low, spread.high], [y, y], color=color, linewidth=width, zorder=3)
    for end in (spread.low, spread.high):
        axes.plot([end, end], [y - 0.13, y + 0.13], color=color, linewidth=width, zorder=3)
