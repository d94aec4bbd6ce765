"""Gives every figure its looks: colours, type, matplotlib settings of its own, small helpers.

Figures are made without pyplot. Matplotlib reads its settings from one global table, so each figure
function runs with the defaults plus `_SETTINGS` and puts the table back: whatever style a notebook
has chosen, a figure of a report looks the same.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, TypeVar

from esper_fn.report._format import clean, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

INK: Final = "#1c2430"
MUTED: Final = "#5c6876"
LINE: Final = "#b4bdc8"
GRID: Final = "#e6eaee"
PAPER: Final = "#ffffff"

ARM_COLOR: Final = {
    "host": "#747d89",
    "grown": "#0b6fb8",
    "uniform": "#2a8a57",
    "random": "#bd7500",
    "static": "#b0478c",
}
DARK: Final = {
    INK: "#e8ecf1",
    MUTED: "#9aa5b3",
    LINE: "#4b5563",
    GRID: "#252c36",
    PAPER: "#12161c",
    ARM_COLOR["host"]: "#98a2ae",
    ARM_COLOR["grown"]: "#4ba9f2",
    ARM_COLOR["uniform"]: "#5cc98f",
    ARM_COLOR["random"]: "#e3a13a",
    ARM_COLOR["static"]: "#e07fbe",
}

WIDTH_INCHES: Final = 10.0
TEXT_POINTS: Final = 9.0
SMALL_POINTS: Final = 8.0
TITLE_INCHES: Final = 0.08  # the left edge of titles, legends and notes
_LEGEND_ROW_INCHES: Final = 0.22
_LEGEND_COLUMNS: Final = 7

_SETTINGS: Final = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "figure.dpi": 100,
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": TEXT_POINTS,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "xtick.major.size": 3.0,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0.0,
}


@contextmanager
def house_style(**settings: object) -> Iterator[None]:
    """Sets matplotlib's defaults with the settings of the house, for the length of a `with` block.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed; install it with"
            " pip install 'esper-fn[cli]'",
            name=error.name,
        ) from error
    with mpl.rc_context(), warnings.catch_warnings():
        # Names from data may use letters that matplotlib's own font lacks; browsers have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update({**_SETTINGS, **settings})
        yield


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Runs a figure function in the style of the house."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with house_style():
            return function(*args, **kwargs)

    return run


class Canvas(NamedTuple):
    """A figure measured in inches from its top left corner, with a title and a subtitle."""

    figure: Figure
    width: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Adds axes whose box lies `left` and `top` inches from the corner."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def text(self, left: float, top: float, words: str, **look: Any) -> None:
        """Writes text at a position in inches; it is never read as mathematics."""
        self.figure.text(
            left / self.width, 1 - top / self.height, clean(words), parse_math=False, **look
        )


def canvas(height: float, title: str, subtitle: str = "") -> Canvas:
    """Makes an empty figure of the house's width, `height` inches high."""
    from matplotlib.figure import Figure

    sheet = Canvas(Figure(figsize=(WIDTH_INCHES, height)), WIDTH_INCHES, height)
    sheet.text(TITLE_INCHES, 0.10, title, fontsize=12.5, fontweight="bold", va="top")
    if subtitle:
        sheet.text(TITLE_INCHES, 0.37, subtitle, fontsize=TEXT_POINTS, color=MUTED, va="top")
    return sheet


def empty(title: str, why: str) -> Figure:
    """Makes a low figure that says why there is nothing to draw."""
    return canvas(0.75, title, why).figure


def plain_ticks(axis: Any, form: Callable[[float], str]) -> None:
    """Writes the ticks of `axis` with `form`."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _position: form(value)))


def step_axis(axes: Axes, end: float, *, name: str = "training step") -> None:
    """Makes x the training steps from 0 to `end`, named at its right end."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    plain_ticks(axes.xaxis, count)
    if name:
        name_x(axes, name)


def name_x(axes: Axes, words: str) -> None:
    """Writes `words` under the right end of the x axis."""
    note(axes, words, (1, 0), (0, -24), "axes fraction", ha="right", va="top")


def note(
    axes: Axes,
    words: str,
    point: tuple[float, float],
    offset: tuple[float, float],
    frame: Any = ("axes fraction", "data"),
    **look: Any,
) -> None:
    """Writes `words`, never read as mathematics, `offset` points from a point of `frame`."""
    look = {"va": "center_baseline", "color": MUTED, "fontsize": SMALL_POINTS, **look}
    axes.annotate(
        words, point, offset, xycoords=frame, textcoords="offset points", parse_math=False, **look
    )


class EndLabel(NamedTuple):
    """A label beside the end of a line."""

    y: float
    words: str
    color: str
    is_bold: bool = False


def label_line_ends(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Writes each label right of the axes at the height of its line, moved apart where they meet.

    Call it when the limits and the scale of the axes are final.
    """
    pixels_per_point = axes.figure.dpi / 72
    box = axes.get_window_extent()
    heights = [
        float(axes.transData.transform((axes.get_xlim()[1], label.y))[1]) for label in labels
    ]
    positions = spread(heights, gap=13.5 * pixels_per_point, low=box.y0, high=box.y1)
    for label, height, position in zip(labels, heights, positions, strict=True):
        note(
            axes,
            label.words,
            (1, (height - box.y0) / box.height),
            (14, (position - height) / pixels_per_point),
            "axes fraction",
            ha="left",
            va="center",
            color=label.color,
            fontsize=TEXT_POINTS,
            fontweight="bold" if label.is_bold else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": label.color,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def spread(positions: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Moves `positions` as little as needed to lie `gap` apart, in their order, within the bounds.

    Neighbours that come too close form a block around the mean of their own positions; blocks
    that meet merge. Where the bounds leave too little room, the gap shrinks.
    """
    if not positions:
        return []
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    blocks: list[list[int]] = []

    def start(block: list[int]) -> float:
        mean = sum(positions[i] - gap * k for k, i in enumerate(block)) / len(block)
        return min(max(mean, low), high - gap * (len(block) - 1))

    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and (
            start(blocks[-2]) + gap * len(blocks[-2]) > start(blocks[-1]) + 1e-9
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = [0.0] * len(positions)
    for block in blocks:
        for k, i in enumerate(block):
            moved[i] = start(block) + gap * k
    return moved


class Key(NamedTuple):
    """One entry of a legend: a marker ("s" is a swatch) and its name."""

    marker: str
    color: str
    words: str


def legend(sheet: Canvas, keys: Sequence[Key], top: float) -> None:
    """Writes `keys` in rows from left to right, `top` inches down."""
    from matplotlib.lines import Line2D

    # Matplotlib fills column by column.
    entries = [key for column in range(_LEGEND_COLUMNS) for key in keys[column::_LEGEND_COLUMNS]]
    lines = [
        Line2D(
            [], [], color=key.color, linestyle="-" if key.marker == "-" else "none",
            linewidth=2.2, marker="" if key.marker == "-" else key.marker,
            markersize=8 if key.marker == "s" else 6,
            markeredgewidth=1.6 if key.marker in "x+" else 0,
        )
        for key in entries
    ]  # fmt: skip
    sheet.figure.legend(
        lines,
        [key.words for key in entries],
        loc="upper left",
        bbox_to_anchor=(TITLE_INCHES / sheet.width, 1 - top / sheet.height),
        ncols=min(len(keys), _LEGEND_COLUMNS),
        labelcolor=MUTED,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        handletextpad=0.5,
        labelspacing=0.6,
        columnspacing=1.8,
    )


def legend_height(keys: Sequence[Key]) -> float:
    """Returns the height of the legend of `keys`, in inches."""
    return _LEGEND_ROW_INCHES * math.ceil(len(keys) / _LEGEND_COLUMNS)
