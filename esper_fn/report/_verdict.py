"""Says in sentences what the numbers of a run mean: better, worse, or no difference."""

from __future__ import annotations

from typing import Final

from esper_fn.report._bars import Score, differences, num_repeats
from esper_fn.report._folder import Run
from esper_fn.report._format import count, percent, points
from esper_fn.report._words import ACCURACY_KEY, PARAMS_KEY, accuracy_name, number

_RIVAL: Final = {
    "static": "a static network of equal size",
    "host": "the host alone",
    "uniform": "growth at every layer alike",
    "random": "growth at random sites",
}


def verdict(run: Run) -> list[str]:
    """Compares growth with each rival in a sentence; the static network comes first."""
    by_arm = {score.arm: score for score in differences(run)}
    sentences = [_sentence(run, by_arm[arm]) for arm in _RIVAL if arm in by_arm]
    missing = [words for arm, words in _RIVAL.items() if arm not in by_arm]
    if missing:
        sentences.insert(0 if "static" not in by_arm else len(sentences), _missing(missing))
    if by_arm and all(score.interval is None for score in by_arm.values()):
        sentences.append(
            "These are single runs: a small difference may be luck, and repeats would tell."
        )
    return [*sentences, *_sizes(run), *_cost(run)]


def _sentence(run: Run, score: Score) -> str:
    rival = _RIVAL[score.arm]
    name = accuracy_name(run.summary)
    size = f"{points(abs(score.value)).lstrip('+±')} percentage points"
    if score.interval is None:
        grown = number(run.summary, ACCURACY_KEY["grown"])
        rival_value = "" if grown is None else percent(grown - score.value)
        values = "" if grown is None else f" ({percent(grown)} against {rival_value})"
        if points(score.value).startswith("±"):
            return f"In {name} the grown network equals {rival}{values}."
        word = "above" if score.value > 0 else "below"
        return f"In {name} the grown network ends {size} {word} {rival}{values}."
    _, low, high = score.interval
    interval = (
        f"{percent(0.95, 0)} interval {points(low)} to {points(high)},"
        f" {num_repeats(run)} paired repeats"
    )
    if low > 0:
        return f"The grown network is better than {rival} by {size} ({interval})."
    if high < 0:
        return f"The grown network is worse than {rival} by {size} ({interval})."
    return (
        f"The grown network and {rival} cannot be told apart: the difference is"
        f" {points(score.value)} percentage points ({interval})."
    )


def _missing(rivals: list[str]) -> str:
    listed = " or with ".join(rivals)
    return (
        f"This report cannot compare growth with {listed}: the numbers for it were not recorded;"
        " run again with the baselines switched on."
    )


def _sizes(run: Run) -> list[str]:
    """Warns when the static network, meant to be as large as the grown one, is not."""
    grown, static = (number(run.summary, PARAMS_KEY[arm]) for arm in ("grown", "static"))
    if grown is None or static is None or abs(grown - static) <= 0.05 * max(grown, static):
        return []
    return [
        f"Mind that the two differ in size: the grown network has {count(grown)} parameters, the"
        f" static one {count(static)}."
    ]


def _cost(run: Run) -> list[str]:
    grown, static = (number(run.summary, "train_flops", arm) for arm in ("grown", "static"))
    if not grown or not static or grown < 0 or static < 0:
        return []
    return [f"Training it took {grown / static:.2f} times the FLOPs of that static network."]
