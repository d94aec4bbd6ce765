"""Drawss arms over time: loss, accuracy and parameters, with what the seeds did below them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from esper_fn.report._folder import Run
from esper_fn.report._format import TIMES, count, percent, percent_tick
from esper_fn.report._series import Curve, Floats, curves, events_of, last_step, smooth
from esper_fn.report._style import (
    ARM_COLOR,
    EndLabel,
    canvas,
    empty,
    label_line_ends,
    note,
    plain_ticks,
    step_axis,
    styled,
)
from esper_fn.report._words import ARM_LABEL, STAGES, accuracy_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

# The moves worth a glyph, from top to bottom of the strip, and their names there.
GLYPHS: Final = {
    "GERMINATED": ("^", "germinated"),
    "GRAFTING": ("o", "graft began"),
    "FOSSILIZED": ("D", "fossilized"),
    "CULLED": ("x", "culled"),
    "CANCELLED": ("+", "cancelled"),
    "ROLLED_BACK": ("v", "rolled back"),
}
_LANE_INCHES: Final = 0.2
_LEFT_INCHES: Final = 1.05
_RIGHT_INCHES: Final = 1.95


@styled
def loss_curves(run: Run, *, is_held_out: bool = False) -> Figure:
    """Draws the loss of every arm, and below it when seeds of the grown arm moved.

    Args:
      run: the run to draw.
      is_held_out: whether to draw the loss on held-out data instead of the training loss.

    Returns:
      A figure; noisy curves are drawn faint, with their running mean on top.
    """
    lines = curves(run, "test_loss" if is_held_out else "loss")
    kind = "held-out loss" if is_held_out else "training loss"
    return _over_time(run, lines, kind.capitalize(), _loss_form, scale=_loss_scale(lines))


@styled
def accuracy_curves(run: Run) -> Figure:
    """Draws the held-out accuracy of every arm, and below it when seeds of the grown arm moved.

    Args:
      run: the run to draw.
    """
    lines = curves(run, "test_accuracy")
    return _over_time(run, lines, accuracy_name(run.summary).capitalize(), percent)


@styled
def parameters_over_time(run: Run) -> Figure:
    """Draws how many parameters every arm trains with, over time.

    Args:
      run: the run to draw.
    """
    lines = curves(run, "parameters")
    return _over_time(run, lines, "Parameters", count, is_stepped=True)


def _loss_form(value: float) -> str:
    return f"{value:#.3g}"


_TICK_FORM: Final[dict[Callable[[float], str], Callable[[float], str]]] = {
    percent: percent_tick,
    _loss_form: lambda value: f"{value:.3g}",
}


def _loss_scale(lines: list[Curve]) -> str:
    """Chooses a logarithmic scale where the (smoothed) loss falls by more than a factor of 20."""
    values = np.concatenate([_main(curve) for curve in lines]) if lines else np.ones(1)
    is_wide = bool(values.min() > 0 and values.max() > 20 * values.min())
    return "log" if is_wide else "linear"


def _main(curve: Curve) -> Floats:
    means = smooth(curve.values)
    return curve.values if means is None else means


def _over_time(
    run: Run,
    lines: list[Curve],
    title: str,
    form: Callable[[float], str],
    *,
    scale: str = "linear",
    is_stepped: bool = False,
) -> Figure:
    if not lines:
        return empty(title, "Nothing of this was measured in this run.")
    lanes = {} if is_stepped else _lanes(run)
    strip_inches = _LANE_INCHES * len(lanes)
    is_smoothed = not is_stepped and any(smooth(curve.values) is not None for curve in lines)
    subtitle = "Each line is one way to train the same task."
    if is_smoothed:
        subtitle += " Bold: running mean; faint: as measured."
    if scale == "log":
        subtitle += " Logarithmic scale."
    sheet = canvas(3.75 + strip_inches + (0.12 if lanes else 0), title, subtitle)
    width = sheet.width - _LEFT_INCHES - _RIGHT_INCHES
    axes = sheet.axes(_LEFT_INCHES, 0.78, width, 2.5)
    axes.set_yscale(scale)
    for curve in lines:
        _draw_curve(axes, curve, is_stepped=is_stepped)
    _set_y(axes, lines, scale)
    plain_ticks(axes.yaxis, _TICK_FORM.get(form, form))
    end = last_step(run)
    step_axis(axes, end, name="" if lanes else "training step")
    if lanes:
        axes.tick_params(axis="x", labelbottom=False, length=0)
        strip = sheet.axes(_LEFT_INCHES, 0.78 + 2.5 + 0.1, width, strip_inches)
        _draw_lanes(strip, lanes)
        step_axis(strip, end)
    label_line_ends(axes, [_end_label(curve, form) for curve in lines])
    return sheet.figure


def _draw_curve(axes: Any, curve: Curve, *, is_stepped: bool) -> None:
    color = ARM_COLOR[curve.arm]
    is_hero = curve.arm == "grown"
    look = {"color": color, "zorder": 4 if is_hero else 3}
    style = "steps-post" if is_stepped else "default"
    means = None if is_stepped else smooth(curve.values)
    if means is not None:
        axes.plot(curve.steps, curve.values, color=color, linewidth=0.6, alpha=0.28, zorder=2)
    values = curve.values if means is None else means
    axes.plot(
        curve.steps,
        values,
        linewidth=2.2 if is_hero else 1.5,
        drawstyle=style,
        marker="o" if len(curve.steps) == 1 else "",
        markersize=4,
        label=curve.arm,
        **look,
    )


def _set_y(axes: Any, lines: list[Curve], scale: str) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    values = np.concatenate([_main(curve) for curve in lines])
    low, high = float(values.min()), float(values.max())
    if scale == "log":
        axes.set_ylim(low / 1.25, high * 1.25)
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        return
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))


def _end_label(curve: Curve, form: Callable[[float], str]) -> EndLabel:
    last = float(_main(curve)[-1])
    words = f"{ARM_LABEL[curve.arm]}  {form(last)}"
    return EndLabel(last, words, ARM_COLOR[curve.arm], is_bold=curve.arm == "grown")


def _lanes(run: Run) -> dict[str, list[int]]:
    """Returns the steps of each kind of move that seeds of the grown arm made."""
    moves: dict[str, list[int]] = {stage: [] for stage in GLYPHS}
    for event in events_of(run, "grown"):
        if event["to"] in moves:
            moves[event["to"]].append(event["step"])
    return {stage: steps for stage, steps in moves.items() if steps}


def _draw_lanes(strip: Any, lanes: dict[str, list[int]]) -> None:
    for y, (stage, steps) in enumerate(lanes.items()):
        marker, words = GLYPHS[stage]
        is_stroke = marker in "x+"
        strip.plot(
            steps,
            [y] * len(steps),
            linestyle="none",
            marker=marker,
            markersize=5,
            markeredgewidth=1.4 if is_stroke else 0,
            color=STAGES[stage].color,
            alpha=0.85 if len(steps) < 100 else 0.45,
            clip_on=False,
            label=stage,
        )
        note(strip, words, (0, y), (-8, 0), ha="right")
        note(strip, f"{count(len(steps))} {TIMES}", (1, y), (14, 0), ha="left")
    strip.set_ylim(len(lanes) - 0.4, -0.6)
    strip.set_yticks([])
