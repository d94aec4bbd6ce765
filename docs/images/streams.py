"""Draws `streams.svg` from the newest record of `plastic_labels`: run it with Python."""

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

INK, QUIET = "#1c1c1c", "#6b6b6b"
ARMS = {
    "grown": ("grown, renewed at changes", "#d9730d", 2.6),
    "snr": ("self-normalised resets", "#3f7d58", 1.6),
    "full_reset": ("reset at every task (oracle)", "#6b6b6b", 1.6),
    "backprop": ("continual backprop", "#3568a8", 1.6),
    "plain": ("no remedy", "#8a5a9e", 1.6),
    "grown_default": ("grown, default policy", "#e0b07a", 1.6),
}


def draw(record, path):
    """Draws the curve of every arm in `ARMS`, each with its name at its end."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "streams", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(9, 4.2))
    for name, (label, color, width) in ARMS.items():
        curve = record["rows"][f"labels_{name}_all"]["curve"]
        tasks = [60 * (index + 0.5) / len(curve) for index in range(len(curve))]
        axes.plot(tasks, curve, color=color, linewidth=width)
        shift = {"snr": -0.55, "grown": 0.35}.get(name, 0.0)
        axes.text(59.5, curve[-1] + shift, label, color=color, va="center", fontsize=10)
    axes.set(xlim=(0, 59), xlabel="task (200 steps each, new random labels)")
    axes.set_ylabel("right answers before learning, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET)
    figure.subplots_adjust(left=0.08, right=0.74, top=0.96, bottom=0.14)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    folder = Path(__file__).resolve()
    records = folder.parents[2] / "benchmarks" / "results" / "plastic_labels.jsonl"
    draw(json.loads(records.read_text().splitlines()[-1]), folder.with_name("streams.svg"))
