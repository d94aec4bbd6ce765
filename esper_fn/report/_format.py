"""Writes numbers and names as people read them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Final

TIMES: Final = "\N{MULTIPLICATION SIGN}"
MINUS: Final = "\N{MINUS SIGN}"


def clean(words: str, limit: int | None = None) -> str:
    """Returns `words` without control characters or lone surrogates, cut to `limit` characters."""
    printable = "".join("\N{REPLACEMENT CHARACTER}" if _is_control(c) else c for c in words)
    if limit is not None and len(printable) > limit:
        return printable[: limit - 1] + "…"
    return printable


def short_names(names: Iterable[str], limit: int) -> dict[str, str]:
    """Cuts each name to `limit` characters where the result stays unique.

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


def count(value: float) -> str:
    """Formats a whole number with narrow groups of three: 12 500."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def percent(value: float, digits: int = 1) -> str:
    """Formats a fraction as a percentage: 91.3 %."""
    return f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def percent_tick(value: float) -> str:
    """Formats a fraction as a percentage with the digits it needs: 80 %, 82.5 %."""
    return f"{100 * value:.6g}\N{NARROW NO-BREAK SPACE}%"


def points(value: float, digits: int = 1) -> str:
    """Formats a difference of fractions in percentage points, with its sign: +1.2."""
    rounded = round(100 * value, digits) + 0.0
    sign = "+" if rounded > 0 else MINUS if rounded < 0 else "±"
    return f"{sign}{abs(rounded):.{digits}f}"


def points_tick(value: float) -> str:
    """Formats a difference in percentage points with the digits it needs: +5, 0, −2.5."""
    return "0" if abs(value) < 1e-12 else f"{100 * value:+.6g}".replace("-", MINUS)
