"""How every figure looks: colours, type, an own set of matplotlib settings, and small helpers.

Figures are made without pyplot. Matplotlib reads its settings from one global table, so each figure
function runs with the defaults plus `_SETTINGS` and puts the table back: whatever style a notebook
has chosen, a figure of a report looks the same.
"""

import functools
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, TypeVar

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

TIMES: Final = "\N{MULTIPLICATION SIGN}"
MINUS: Final = "\N{MINUS SIGN}"

WIDTH_INCHES: Final = 10.0
TEXT_POINTS: Final = 9.0
SMALL_POINTS: Final = 8.0
TITLE_INCHES: Final = 0.08  # the left edge of titles, legends and notes
_LEGEND_ROW_INCHES: Final = 0.22

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
    """Matplotlib's defaults with the settings of the house, for the length of a `with` block.

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
    """Run a figure function in the style of the house."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with house_style():
            return function(*args, **kwargs)

    return run


class Canvas(NamedTuple):
    """A figure measured in inches from its top left corner, with a title and a subtitle."""

    figure: "Figure"
    width: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """Axes whose box lies `left` and `top` inches from the corner."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def text(self, left: float, top: float, words: str, **look: Any) -> None:
        """Plain text at a place in inches; never read as mathematics."""
        self.figure.text(
            left / self.width, 1 - top / self.height, clean(words), parse_math=False, **look
        )


def canvas(height: float, title: str, subtitle: str = "") -> Canvas:
    """An empty figure of the house's width, `height` inches high."""
    from matplotlib.figure import Figure

    made = Canvas(Figure(figsize=(WIDTH_INCHES, height)), WIDTH_INCHES, height)
    made.text(TITLE_INCHES, 0.10, title, fontsize=12.5, fontweight="bold", va="top")
    if subtitle:
        made.text(TITLE_INCHES, 0.37, subtitle, fontsize=TEXT_POINTS, color=MUTED, va="top")
    return made


def empty(title: str, why: str) -> "Figure":
    """A low figure that says why there is nothing to draw."""
    return canvas(0.75, title, why).figure


def clean(words: str, limit: int | None = None) -> str:
    """`words` without control characters or lone surrogates, cut to `limit` characters."""
    printable = "".join("\N{REPLACEMENT CHARACTER}" if _is_control(c) else c for c in words)
    if limit is not None and len(printable) > limit:
        return printable[: limit - 1] + "…"
    return printable


def short_names(names: Iterable[str], limit: int) -> dict[str, str]:
    """Each name cut to `limit` characters where it can be cut without meeting another one.

    The cut lies in the middle, or else where it keeps the names apart; where no cut does, the
    names are numbered.
    """
    printable = {name: clean(name) for name in names}

    def cut(name: str, tail: int) -> str:
        if len(name) <= limit:
            return name
        return f"{name[: limit - 1 - tail]}…{name[len(name) - tail :]}"

    middle = (limit - 1) // 2
    for tail in sorted(range(limit), key=lambda tail: abs(tail - middle)):
        short = {name: cut(text, tail) for name, text in printable.items()}
        if len(set(short.values())) == len(short):
            return short
    return {
        name: f"{i}: {clean(text, limit - len(f'{i}: '))}"
        for i, (name, text) in enumerate(printable.items())
    }


def _is_control(character: str) -> bool:
    category = unicodedata.category(character)
    return category.startswith("C") or category in {"Zl", "Zp"}


def plain_ticks(axis: Any, form: Callable[[float], str]) -> None:
    """Write the ticks of `axis` with `form`."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _position: form(value)))


def step_axis(axes: "Axes", end: float, *, name: str = "training step") -> None:
    """Make x the training steps from 0 to `end`, named at its right end."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    plain_ticks(axes.xaxis, count)
    if name:
        axes.annotate(
            name,
            (1, 0),
            (0, -24),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="top",
            color=MUTED,
            fontsize=SMALL_POINTS,
        )


class EndLabel(NamedTuple):
    """What is written beside the end of a line."""

    y: float
    words: str
    color: str
    is_bold: bool = False


def label_line_ends(axes: "Axes", labels: Sequence[EndLabel]) -> None:
    """Write each label right of the axes at the height of its line, moved apart where they meet.

    Call it when the limits and the scale of the axes are final.
    """
    pixels_per_point = axes.figure.dpi / 72
    box = axes.get_window_extent()
    heights = [
        float(axes.transData.transform((axes.get_xlim()[1], label.y))[1]) for label in labels
    ]
    places = spread(heights, gap=13.5 * pixels_per_point, low=box.y0, high=box.y1)
    for label, height, place in zip(labels, heights, places, strict=True):
        axes.annotate(
            label.words,
            (1, (height - box.y0) / box.height),
            (14, (place - height) / pixels_per_point),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="left",
            va="center",
            color=label.color,
            fontweight="bold" if label.is_bold else "normal",
            annotation_clip=False,
            parse_math=False,
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


def spread(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move `places` as little as needed to lie `gap` apart, in their order, within the bounds.

    Neighbours that come too close form a block around the mean of the places they wanted; blocks
    that meet merge. Where the bounds leave too little room, the gap shrinks.
    """
    if not places:
        return []
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[list[int]] = []

    def start(block: list[int]) -> float:
        wanted = sum(places[i] - gap * k for k, i in enumerate(block)) / len(block)
        return min(max(wanted, low), high - gap * (len(block) - 1))

    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and (
            start(blocks[-2]) + gap * len(blocks[-2]) > start(blocks[-1]) + 1e-9
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = [0.0] * len(places)
    for block in blocks:
        for k, i in enumerate(block):
            moved[i] = start(block) + gap * k
    return moved


class Key(NamedTuple):
    """One entry of a legend: a marker ("s" is a swatch) and its name."""

    marker: str
    color: str
    words: str


def legend(made: Canvas, keys: Sequence[Key], top: float) -> None:
    """Write `keys` from left to right, in rows of about equally many, `top` inches down."""
    for row, entries in enumerate(_legend_rows(keys)):
        x = TITLE_INCHES
        y = 1 - (top + 0.1 + row * _LEGEND_ROW_INCHES) / made.height
        for key in entries:
            made.figure.add_artist(_marker(key, (x + 0.06) / made.width, y))
            made.figure.text(
                (x + 0.19) / made.width,
                y,
                key.words,
                va="center_baseline",
                fontsize=TEXT_POINTS,
                color=MUTED,
                parse_math=False,
            )
            x += _key_inches(key)


def legend_height(keys: Sequence[Key]) -> float:
    """The height of the legend of `keys`, in inches."""
    return _LEGEND_ROW_INCHES * len(_legend_rows(keys))


def _legend_rows(keys: Sequence[Key]) -> list[Sequence[Key]]:
    total = sum(_key_inches(key) for key in keys)
    num_rows = max(1, math.ceil(total / (WIDTH_INCHES - 2 * TITLE_INCHES)))
    length = math.ceil(len(keys) / num_rows)
    return [keys[i : i + length] for i in range(0, len(keys), length)]


def _key_inches(key: Key) -> float:
    from matplotlib.textpath import TextPath

    words = TextPath((0, 0), key.words, size=TEXT_POINTS).get_extents().width / 72
    return 0.19 + float(words) + 0.24


def _marker(key: Key, x: float, y: float) -> Any:
    from matplotlib.lines import Line2D

    if key.marker == "-":
        return Line2D([x - 0.006, x + 0.008], [y, y], color=key.color, linewidth=2.2)
    is_stroke = key.marker in "x+"
    return Line2D(
        [x],
        [y],
        linestyle="none",
        marker=key.marker,
        markersize=8 if key.marker == "s" else 6,
        markeredgewidth=1.6 if is_stroke else 0,
        color=key.color,
    )


def count(value: float) -> str:
    """A whole number with narrow groups of three: 12 500."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a percentage: 91.3 %."""
    return f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def percent_tick(value: float) -> str:
    """A fraction as a percentage with the digits it needs: 80 %, 82.5 %."""
    return f"{100 * value:.6g}\N{NARROW NO-BREAK SPACE}%"


def points(value: float, digits: int = 1) -> str:
    """A difference of fractions in percentage points, with its sign: +1.2."""
    rounded = round(100 * value, digits) + 0.0
    sign = "+" if rounded > 0 else MINUS if rounded < 0 else "±"
    return f"{sign}{abs(rounded):.{digits}f}"


def points_tick(value: float) -> str:
    """A difference of fractions in percentage points with the digits it needs: +5, 0, −2.5."""
    return "0" if abs(value) < 1e-12 else f"{100 * value:+.6g}".replace("-", MINUS)
