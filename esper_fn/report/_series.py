"""Takes what the figures draw from the records of a run: curves, histories of seeds, fates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper_fn.report._folder import Run
from esper_fn.report._words import ARMS, number

Floats = NDArray[np.float64]

TERMINAL: Final = ("FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK")
_MAX_POINTS: Final = 1_000


class Curve(NamedTuple):
    """A quantity of an arm at the training steps where it was measured and finite."""

    arm: str
    steps: Floats
    values: Floats


class Stay(NamedTuple):
    """The steps `[start, end)` that a seed spent in one stage."""

    stage: str
    start: int
    end: int


class History(NamedTuple):
    """The path of a seed through the stages; seeds that never moved have none."""

    seed: int
    site: str
    chunk: int
    stays: tuple[Stay, ...]
    num_moves: int

    @property
    def is_fossil(self) -> bool:
        """Whether the seed ended as a permanent part of the host."""
        return self.stays[-1].stage == "FOSSILIZED"


class Ramp(NamedTuple):
    """Alpha over one life of one adapter, and the stage that ended that life, if one did."""

    seed: int
    steps: Floats
    alpha: Floats
    fate: str | None
    fate_step: int | None


def curves(run: Run, key: str) -> list[Curve]:
    """Returns `key` of every arm that measured it at least once, in the order of `ARMS`."""
    result = []
    for arm in ARMS:
        records = sorted((m for m in run.metrics if m["arm"] == arm), key=lambda m: m["step"])
        pairs = [(m["step"], v) for m in records if (v := number(m, key)) is not None]
        if pairs:
            steps, values = np.array(pairs, dtype=np.float64).T
            result.append(Curve(arm, *_thin(steps, values)))
    return result


def _thin(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Thins a curve to `_MAX_POINTS` means of equal runs of points; first and last stay."""
    if len(steps) <= _MAX_POINTS:
        return steps, values
    edges = np.linspace(1, len(steps) - 1, _MAX_POINTS - 1).astype(int)
    slices = [slice(a, b) for a, b in itertools.pairwise(edges)]
    means = [float(values[part].mean()) for part in slices]
    middles = [float(steps[part].mean()) for part in slices]
    return (
        np.concatenate([steps[:1], middles, steps[-1:]]),
        np.concatenate([values[:1], means, values[-1:]]),
    )


def smooth(values: Floats) -> Floats | None:
    """Returns a centred running mean over 1/40 of the points, or None where they are too few."""
    width = len(values) // 40
    if width < 2:
        return None
    kernel = np.ones(2 * (width // 2) + 1)
    total = np.convolve(values, kernel, mode="same")
    weight = np.convolve(np.ones_like(values), kernel, mode="same")
    smoothed: Floats = total / weight
    return smoothed


def last_step(run: Run) -> int:
    """Returns the last training step that a record of the run names; at least 1."""
    steps: list[int] = [record["step"] for record in (*run.metrics, *run.events)]
    declared = number(run.summary, "steps")
    return max(1, *steps, int(declared or 0))


def events_of(run: Run, arm: str) -> list[dict[str, Any]]:
    """Returns the events of one arm in the order of their steps."""
    return sorted((e for e in run.events if e["arm"] == arm), key=lambda e: e["step"])


def histories(run: Run, arm: str) -> list[History]:
    """Returns the histories of all seeds that moved, by site (in order of seeds), then by seed."""
    end = last_step(run)
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for event in events_of(run, arm):
        by_seed.setdefault(event["seed"], []).append(event)
    result = []
    for seed, events in sorted(by_seed.items()):
        stages = [events[0]["from"], *(event["to"] for event in events)]
        starts = [0, *(event["step"] for event in events), end]
        stays = tuple(
            Stay(stage, starts[i], starts[i + 1])
            for i, stage in enumerate(stages)
            if starts[i] < starts[i + 1] or i == len(stages) - 1
        )
        first = events[0]
        result.append(History(seed, first["site"], first["chunk"], stays, len(events)))
    order = {site: i for i, site in enumerate(dict.fromkeys(h.site for h in result))}
    return sorted(result, key=lambda h: (order[h.site], h.seed))


def ramps(run: Run, arm: str) -> list[Ramp]:
    """Returns alpha over every life of every adapter.

    A seed whose adapter was freed starts a new life later.
    """
    records = sorted(
        (m for m in run.metrics if m["arm"] == arm and m.get("alpha") is not None),
        key=lambda m: m["step"],
    )
    open_lives: dict[str, list[tuple[int, float]]] = {}
    ended: list[tuple[int, list[tuple[int, float]]]] = []
    for record in records:
        present = {key: number(record["alpha"], key) for key in record["alpha"]}
        gone = [key for key in open_lives if key not in present]
        ended.extend((int(key), open_lives.pop(key)) for key in gone)
        for key, alpha in present.items():
            value = float("nan") if alpha is None else alpha
            open_lives.setdefault(key, []).append((record["step"], value))
    ended.extend((int(key), life) for key, life in open_lives.items())
    events = events_of(run, arm)
    fates = _fates(events)
    result = [
        _ramp(seed, _anchored(life, seed, events), fates.get(seed, ())) for seed, life in ended
    ]
    return sorted(result, key=lambda ramp: (ramp.steps[0], ramp.seed))


def _anchored(
    life: list[tuple[int, float]], seed: int, events: Iterable[dict[str, Any]]
) -> list[tuple[int, float]]:
    """Adds to a life the steps between samples where its ramp began, at 0, and where it ended."""
    before, points = -1, dict(life)
    for event in events:
        step = event["step"]
        if event["seed"] != seed or step > life[-1][0]:
            continue
        if event["to"] in TERMINAL and step < life[0][0]:
            before = step
        elif event["to"] == "GRAFTING":
            points.setdefault(step, 0.0)
        elif event["from"] == "GRAFTING" and event["to"] == "STABILIZATION":
            # A sample's step counts the steps done, an event's is its own: at 275 it came before.
            points[step] = next((alpha for later, alpha in life if later > step), life[-1][1])
    return sorted((step, alpha) for step, alpha in points.items() if step > before)


def _fates(events: Iterable[dict[str, Any]]) -> dict[int, list[tuple[int, str]]]:
    fates: dict[int, list[tuple[int, str]]] = {}
    for event in events:
        if event["to"] in TERMINAL:
            fates.setdefault(event["seed"], []).append((event["step"], event["to"]))
    return fates


def _ramp(seed: int, life: list[tuple[int, float]], fates: Sequence[tuple[int, str]]) -> Ramp:
    steps, alpha = (np.array(column, dtype=np.float64) for column in zip(*life, strict=True))
    # The first end after the start is this life's own: a seed germinates again only after it.
    fate_step, fate = next(((s, f) for s, f in fates if s >= steps[0]), (None, None))
    return Ramp(seed, steps, alpha, fate, fate_step)
