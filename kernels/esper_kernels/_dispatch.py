"""Which implementation runs, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from esper_kernels._errors import ArgumentError, UnavailableError

Implementation = Literal["auto", "reference", "pallas", "triton"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("auto", "reference", "pallas", "triton")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What would run, and why nothing before it in the order of preference would."""

    operation: str
    implementation: str
    refusals: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.operation}: {self.implementation}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def choose(
    operation: str, implementation: str, candidates: Mapping[str, str | None], *, framework: str
) -> Choice:
    """Return the first candidate without a refusal among those that `implementation` allows.

    Args:
      operation: its name, for messages.
      implementation: `auto` for all candidates in their order, else the one that must run.
      candidates: why each cannot serve the call, None where it can; the best one first.
      framework: `jax` or `torch`, for messages.

    Raises:
      ArgumentError: `implementation` is no such name.
      UnavailableError: no allowed candidate can; lists all their reasons.

    >>> print(choose("graft", "auto", {"triton": "no GPU", "reference": None}, framework="torch"))
    graft: reference
      not triton: no GPU
    """
    if implementation not in IMPLEMENTATIONS:
        raise ArgumentError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    allowed = dict(candidates)
    if implementation != "auto":
        missing = f"there is none for {framework}; {framework} has {', '.join(candidates)}"
        allowed = {implementation: candidates.get(implementation, missing)}
    refusals: dict[str, str] = {}
    for name, refusal in allowed.items():
        if refusal is None:
            return Choice(operation=operation, implementation=name, refusals=refusals)
        refusals[name] = refusal
    raise UnavailableError(operation, refusals)
