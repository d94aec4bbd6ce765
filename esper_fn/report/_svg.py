"""Writes figures as SVG: text stays text, and colours follow the page's light or dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Final

from esper_fn.report._style import ARM_COLOR, DARK, GRID, INK, LINE, MUTED, PAPER, house_style
from esper_fn.report._words import STAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TAG: Final = re.compile(r"<[^<>]*>")
_COLOR: Final = re.compile(r"#[0-9a-f]{6}\b")

# The name of each colour of the house as a CSS variable, and its value on light and dark paper.
VARIABLES: Final[Mapping[str, tuple[str, str, str]]] = {
    light: (f"--{name}", light, dark)
    for name, light, dark in (
        ("ink", INK, DARK[INK]),
        ("muted", MUTED, DARK[MUTED]),
        ("line", LINE, DARK[LINE]),
        ("grid", GRID, DARK[GRID]),
        ("paper", PAPER, DARK[PAPER]),
        *((f"arm-{arm}", color, DARK[color]) for arm, color in ARM_COLOR.items()),
        *((f"stage-{stage}", info.color, info.dark_color) for stage, info in STAGES.items()),
    )
}


def css_variables() -> str:
    """Writes the CSS that defines every colour, for light and for dark pages."""
    light = "".join(f"{name}:{value};" for name, value, _ in VARIABLES.values())
    dark = "".join(f"{name}:{value};" for name, _, value in VARIABLES.values())
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Writes `figure` as an `<svg>` element for a page.

    Args:
      figure: a figure of this package.
      name: unique in the page; keeps the ids of two figures apart.
      description: what a screen reader says instead.
    """
    buffer = io.StringIO()
    with house_style(**{"svg.hashsalt": f"esper-fn-{name}"}):
        figure.savefig(
            buffer, format="svg", facecolor="none", edgecolor="none", metadata={"Date": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Comments and metadata first: nothing else that matplotlib writes there concerns the page.
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = _TAG.sub(_page_tag, svg)
    view_box = re.search(r'viewBox="[-0-9. ]+"', svg)
    _, _, content = svg.partition(">")
    label = escape(description, quote=True)
    box = "" if view_box is None else view_box[0]
    return f'<svg {box} role="img" aria-label="{label}">{content.strip()}\n'


def _page_tag(match: re.Match[str]) -> str:
    """Rewrites a tag for the page: no namespaces, no ids that only name groups, CSS colours."""
    tag = match[0].replace("xlink:href", "href")
    if tag.startswith("<g "):
        tag = re.sub(r' id="[^"]*"', "", tag)
    return _COLOR.sub(_variable, tag)


def _variable(match: re.Match[str]) -> str:
    known = VARIABLES.get(match[0])
    return match[0] if known is None else f"var({known[0]})"
