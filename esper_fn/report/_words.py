"""Names the arms, the stages, and the keys of their numbers in a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

SCHEMA: Final = 1

ARMS: Final = ("host", "grown", "uniform", "random", "static")
GROWING_ARMS: Final = ("grown", "uniform", "random")
ARM_LABEL: Final = {
    "host": "host alone",
    "grown": "grown",
    "uniform": "uniform growth",
    "random": "random growth",
    "static": "static, equal size",
}
ACCURACY_KEY: Final = {
    "host": "host_accuracy",
    "grown": "grown_accuracy",
    "uniform": "uniform_growth_accuracy",
    "random": "random_growth_accuracy",
    "static": "static_equal_params_accuracy",
}
DIFFERENCE_KEY: Final = {
    "host": "grown_minus_host",
    "uniform": "grown_minus_uniform",
    "random": "grown_minus_random",
    "static": "grown_minus_static",
}
PARAMS_KEY: Final = {arm: f"{arm}_params" for arm in ARMS}


class StageInfo(NamedTuple):
    """A lifecycle stage: its name, colours and explanation for a newcomer."""

    label: str
    color: str
    dark_color: str
    meaning: str


# The eleven colours were fitted so that every pair stays apart (CIE Lab distance of 20 or more) for
# normal sight and for simulated protanopia, deuteranopia and tritanopia, on white and on dark
# paper; a test holds this.
STAGES: Final[Mapping[str, StageInfo]] = {
    "DORMANT": StageInfo(
        "Dormant",
        "#d5dae1",
        "#3b4450",
        "The seed only watches its part of the activation. It has no network of its own.",
    ),
    "GERMINATED": StageInfo(
        "Germinated",
        "#8acc75",
        "#9de679",
        "A small network, the adapter, was just created for the seed. At first it changes nothing.",
    ),
    "TRAINING": StageInfo(
        "Training",
        "#fdca40",
        "#fdca41",
        "The adapter learns behind the host, whose output does not change by a single bit.",
    ),
    "GRAFTING": StageInfo(
        "Grafting",
        "#e7672c",
        "#de720b",
        "The adapter acts in the host and learns: its weight, alpha, is 1 at once or rises to 1.",
    ),
    "STABILIZATION": StageInfo(
        "Stabilization",
        "#54ccff",
        "#0fd8ff",
        "The adapter is fully in and learns; the loss settles before anything is judged.",
    ),
    "EVALUATING": StageInfo(
        "Evaluating",
        "#3a81e9",
        "#1b66e4",
        "Held-out batches are scored with and without the adapter: does it really help?",
    ),
    "FINE_TUNING": StageInfo(
        "Fine-tuning",
        "#6c3993",
        "#8d55b3",
        "The adapter helps. It learns on, and is measured again before it is kept for good.",
    ),
    "FOSSILIZED": StageInfo(
        "Fossilized",
        "#00575c",
        "#079a7e",
        "The adapter is a permanent part of the network and goes on learning.",
    ),
    "CULLED": StageInfo(
        "Culled",
        "#932424",
        "#d12c30",
        "The adapter did not help and was removed. The seed rests, then it may try again.",
    ),
    "CANCELLED": StageInfo(
        "Cancelled",
        "#8b866b",
        "#9aa76c",
        "The attempt was called off before the host ever felt it. The seed rests, then may retry.",
    ),
    "ROLLED_BACK": StageInfo(
        "Rolled back",
        "#c477a9",
        "#ed79c6",
        "Something went wrong, such as a value that is not finite: the adapter was undone at once. "
        "After a quarantine the seed may try again.",
    ),
}


def number(record: Mapping[str, Any], *path: str) -> float | None:
    """Returns the finite number at `path` inside nested mappings, or None where there is none."""
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


class Interval(NamedTuple):
    """A mean over repeated runs and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(summary: Mapping[str, Any], key: str) -> Interval | None:
    """Returns the interval that a repeated run recorded under `key`, or None."""
    parts = [number(summary, "repeats", "intervals", key, part) for part in Interval._fields]
    if any(part is None for part in parts):
        return None
    return Interval(*(part for part in parts if part is not None))


def accuracy_name(summary: Mapping[str, Any]) -> str:
    """Names the accuracy of this run's task."""
    if summary.get("task") == "language_model":
        return "next-character accuracy"
    return "held-out accuracy"
