"""Which steps stay on disk: small values that combine, decided without touching a disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from esper_fn._arguments import is_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a retention sees of a step on disk.

    Attributes:
      step: training steps done.
      blobs: bytes by content; steps that share a file name the same content, which then counts
        once.
      metrics: of the step.
      is_sound: False where a verification proved it corrupt.
      doubt: why it cannot be judged just now; it stays, and no retention counts it.
    """

    step: int
    blobs: Mapping[str, int]
    metrics: Mapping[str, float]
    is_sound: bool = True
    doubt: str = ""


class Context(NamedTuple):
    """What else there is to know."""

    protected: frozenset[int]
    """Steps that stay whatever a retention says."""
    incoming_bytes: int
    """Of a step about to be written."""


Choose = Callable[[Sequence[Step], Context], Mapping[int, str]]
"""`choose(history, context)`: the steps to keep, and why; `history` is sorted by step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which steps to keep.

    `a | b` keeps what either keeps. `a & b` keeps what `b` keeps among what `a` keeps, so put a
    byte budget last: `(latest(3) | every(1000)) & within_bytes(10**10)`.

    Attributes:
      name: as code would make it.
      choose: see `Choose`.
      max_bytes: a budget that holds at all times, also while a step is being written, or None.
    """

    name: str
    choose: Choose
    max_bytes: int | None = None

    def __or__(self, other: Retention) -> Retention:
        def choose(history: Sequence[Step], context: Context) -> Mapping[int, str]:
            return {**other.choose(history, context), **self.choose(history, context)}

        budgets = _budgets(self, other)
        limit = max(budgets) if len(budgets) == 2 else None
        return Retention(name=f"({self.name} | {other.name})", choose=choose, max_bytes=limit)

    def __and__(self, other: Retention) -> Retention:
        def choose(history: Sequence[Step], context: Context) -> Mapping[int, str]:
            first = self.choose(history, context)
            left = [row for row in history if row.step in first or row.step in context.protected]
            second = other.choose(left, context)
            return {
                step: f"{why} and {second[step]}" for step, why in first.items() if step in second
            }

        limit = min(_budgets(self, other), default=None)
        return Retention(name=f"({self.name} & {other.name})", choose=choose, max_bytes=limit)


def _budgets(*retentions: Retention) -> list[int]:
    return [each.max_bytes for each in retentions if each.max_bytes is not None]


def _by_history(name: str, choose: Callable[[Sequence[Step]], Mapping[int, str]]) -> Retention:
    """A retention that looks at nothing but the steps."""
    return Retention(name=name, choose=lambda history, context: choose(history))


def latest(num_steps: int) -> Retention:
    """Keeps the newest N steps.

    >>> latest(3).name
    'latest(3)'
    """
    _check("num_steps", num_steps, 1)
    why = f"among the latest {num_steps}"
    return _by_history(
        f"latest({num_steps})", lambda history: {row.step: why for row in history[-num_steps:]}
    )


def every(num_steps: int) -> Retention:
    """Keeps steps whose number is a multiple of `num_steps`."""
    _check("num_steps", num_steps, 1)
    why = f"a multiple of {num_steps}"
    return _by_history(
        f"every({num_steps})",
        lambda history: {row.step: why for row in history if row.step % num_steps == 0},
    )


def best(num_steps: int, metric: str, mode: Literal["min", "max"] = "min") -> Retention:
    """Keeps the N best steps by a metric; a step without it is none of them, the newest wins a tie.

    Args:
      num_steps: N.
      metric: its name, as given to `Writer.save(..., metrics=)`.
      mode: whether `min` or `max` is best.
    """
    _check("num_steps", num_steps, 1)
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    sign = 1 if mode == "min" else -1

    def choose(history: Sequence[Step]) -> Mapping[int, str]:
        known = [row for row in history if math.isfinite(row.metrics.get(metric, math.nan))]
        ranked = sorted(known, key=lambda row: (sign * row.metrics[metric], -row.step))
        return {
            row.step: f"among the {num_steps} best by {metric} ({row.metrics[metric]:.6g})"
            for row in ranked[:num_steps]
        }

    return _by_history(f"best({num_steps}, {metric!r}, {mode!r})", choose)


def pinned(steps: Iterable[int]) -> Retention:
    """Keeps these steps, by number."""
    numbers = frozenset(steps)
    for step in numbers:
        _check("a pinned step", step, 0)
    return _by_history(
        f"pinned({sorted(numbers)})",
        lambda history: {row.step: "pinned" for row in history if row.step in numbers},
    )


def within_bytes(num_bytes: int) -> Retention:
    """Keeps the newest steps that fit into a budget together with a step about to be written.

    Files that several steps share count once. Protected steps are counted first, since they stay
    anyhow: a budget holds at all times only if it has room for two steps.
    """
    _check("num_bytes", num_bytes, 1)

    def choose(history: Sequence[Step], context: Context) -> Mapping[int, str]:
        counted: dict[str, int] = {}
        for row in history:
            if row.step in context.protected:
                counted.update(row.blobs)
        chosen = {}
        for row in reversed(history):
            wider = {**counted, **row.blobs}
            if sum(wider.values()) + context.incoming_bytes > num_bytes:
                if row.step in context.protected:
                    continue
                break
            counted = wider
            chosen[row.step] = f"within {num_bytes} bytes"
        return chosen

    return Retention(name=f"within_bytes({num_bytes})", choose=choose, max_bytes=num_bytes)


def everything() -> Retention:
    """Keeps all steps."""
    return _by_history(
        "everything()", lambda history: {row.step: "everything is kept" for row in history}
    )


class Decision(NamedTuple):
    """What is to become of one step, and why."""

    step: int
    is_kept: bool
    why: str


def decide(
    keep: Retention,
    history: Iterable[Step],
    *,
    protected: Mapping[int, str],
    incoming_bytes: int = 0,
) -> list[Decision]:
    """Decides which steps stay and which go, without touching a disk.

    Damaged steps go as soon as a sound one is newer, and at once where there is a byte budget and
    any sound one. The protected ones never go, nor those that cannot be judged.

    Args:
      keep: the retention.
      history: all steps on disk.
      protected: steps that stay, and why: the one just written and the last good one.
      incoming_bytes: of a step about to be written.

    Returns:
      Every step's fate, oldest first.

    >>> steps = [Step(step=n, blobs={str(n): 1}, metrics={}) for n in range(4)]
    >>> [row.step for row in decide(latest(2), steps, protected={0: "pinned"}) if row.is_kept]
    [0, 2, 3]
    """
    steps = sorted(history, key=lambda row: row.step)
    sound = [row for row in steps if row.is_sound and not row.doubt]
    newest = sound[-1].step if sound else None
    shared = {name for row in sound for name in row.blobs}
    own = {name: size for row in steps if row.doubt for name, size in row.blobs.items()}
    incoming_bytes += sum(size for name, size in own.items() if name not in shared)
    chosen = keep.choose(sound, Context(frozenset(protected), incoming_bytes))
    decisions = []
    for row in steps:
        is_kept, why = False, f"not kept by {keep.name}"
        if row.step in protected:
            is_kept, why = True, protected[row.step]
        elif row.doubt:
            is_kept, why = True, f"it cannot be judged: {row.doubt}"
        elif not row.is_sound:
            is_kept = newest is None or (keep.max_bytes is None and newest < row.step)
            why = "damaged" + (", but no newer step is sound" if is_kept else "")
        elif row.step in chosen:
            is_kept, why = True, chosen[row.step]
        decisions.append(Decision(row.step, is_kept, why))
    return decisions


def _check(name: str, value: object, least: int) -> None:
    if not is_count(value, least):
        raise ValueError(f"{name} must be an int, at least {least}, got {value!r}")
