"""Draws `anatomy.svg`, the picture of the glossary: `python docs/images/anatomy.py`."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, QUIET, HOST, LIVE = "#1c1c1c", "#6b6b6b", "#dfe7f1", "#f3b061"


def box(axes, x, y, width, height, text, color="white", size=10):
    """A rounded box with a text in its middle."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=color,
            edgecolor=INK,
            linewidth=1,
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes, start, end, color=INK, style="-|>", curve=0.0):
    """An arrow, straight or bent by `curve`."""
    axes.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": style,
            "color": color,
            "linewidth": 1.2,
            "connectionstyle": f"arc3,rad={curve}",
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )


def note(axes, x, y, text, **options):
    """A small text."""
    axes.text(x, y, text, **{"fontsize": 9, "color": QUIET, "va": "center", **options})


def draw(path: Path) -> None:
    """Writes the picture."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "anatomy", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(10, 5.2))
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 5.2)
    axes.axis("off")

    note(axes, 1.55, 5.0, "host: your model", ha="center", fontsize=10, color=INK)
    box(axes, 0.6, 4.15, 1.9, 0.55, "layer", HOST)
    arrow(axes, (1.55, 4.12), (1.55, 3.62))
    for chunk in range(4):
        color = LIVE if chunk == 2 else "white"
        axes.add_patch(
            Rectangle((0.35 + 0.6 * chunk, 3.1), 0.6, 0.5, facecolor=color, edgecolor=INK)
        )
        axes.text(0.65 + 0.6 * chunk, 3.35, f"{chunk}", ha="center", va="center", fontsize=9)
    note(axes, 0.35, 3.82, "a site", color=INK)
    note(axes, 0.3, 2.9, "an activation in 4 chunks,\neach with a seed", va="top")
    arrow(axes, (1.55, 2.15), (1.55, 1.62))
    box(axes, 0.6, 1.05, 1.9, 0.55, "next layer", HOST)

    note(axes, 4.85, 5.0, "what the seed of chunk 2 has grown", ha="center", fontsize=10, color=INK)
    axes.text(3.55, 4.35, "x", ha="center", va="center", fontsize=12, style="italic")
    arrow(axes, (2.18, 3.62), (3.4, 4.32), color=QUIET, curve=-0.2)
    arrow(axes, (3.7, 4.35), (6.1, 4.35))
    arrow(axes, (3.55, 4.18), (3.55, 3.4))
    box(axes, 2.95, 2.75, 1.2, 0.6, "adapter", LIVE)
    arrow(axes, (4.18, 3.05), (4.75, 3.05))
    note(axes, 4.46, 3.22, "r", ha="center", style="italic", color=INK)
    box(axes, 4.8, 2.78, 0.8, 0.54, "× alpha")
    arrow(axes, (5.63, 3.05), (6.25, 3.05))
    arrow(axes, (6.25, 3.05), (6.25, 4.18))
    axes.text(
        6.25,
        4.35,
        "+",
        ha="center",
        va="center",
        fontsize=13,
        bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": INK},
    )
    arrow(axes, (6.42, 4.35), (6.95, 4.35))
    axes.text(7.1, 4.35, "y", ha="center", va="center", fontsize=12, style="italic")
    note(axes, 4.85, 2.38, "r = 0 at first, so germination changes nothing", ha="center")

    note(axes, 8.75, 4.35, "bank of blueprint “low_rank”", ha="center", fontsize=10, color=INK)
    for slot, (text, color) in enumerate(
        (("adapter of seed 2", LIVE), ("free", "white"), ("free", "white"))
    ):
        axes.add_patch(
            Rectangle((7.75, 3.6 - 0.45 * slot), 2.0, 0.45, facecolor=color, edgecolor=INK)
        )
        axes.text(8.75, 3.82 - 0.45 * slot, text, ha="center", va="center", fontsize=9)
        note(axes, 7.65, 3.82 - 0.45 * slot, f"slot {slot}", ha="right")
    note(axes, 8.75, 2.5, "capacity: 3 slots", ha="center")

    note(axes, 3.2, 1.62, "one row of state for each seed", fontsize=10, color=INK)
    header = ("seed", "stage", "alpha", "slot")
    rows = [
        header,
        ("0", "DORMANT", "0", "–"),
        ("1", "DORMANT", "0", "–"),
        ("2", "GRAFTING", "0.4", "0"),
        ("3", "CULLED", "0", "–"),
    ]
    for line, row in enumerate(rows):
        for column, (text, x) in enumerate(zip(row, (3.25, 3.95, 5.4, 6.2), strict=True)):
            del column
            axes.text(
                x,
                1.32 - 0.26 * line,
                text,
                fontsize=9,
                color=QUIET if line == 0 else INK,
                va="center",
            )
    axes.add_patch(Rectangle((3.15, 0.41), 3.6, 0.26, facecolor=LIVE, alpha=0.45, edgecolor="none"))
    note(axes, 7.0, 0.54, "decided by a policy, a person or a program")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("anatomy.svg"))
