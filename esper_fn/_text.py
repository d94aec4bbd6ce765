"""Names and messages of others, as a terminal or a log may show them."""

from __future__ import annotations


def plain(text: object, *, limit: int | None = None) -> str:
    r"""One line in which every character that is not printable stands escaped.

    Control characters, escape sequences, direction marks, zero-width characters, ends of line and
    lone surrogates are such.

    Args:
      text: what somebody else may have written.
      limit: characters of it that are shown, at most.

    >>> plain("\x1b[2Ja\u202eb\n")
    '\\x1b[2Ja\\u202eb\\n'
    """
    words = str(text)
    if limit is not None and len(words) > limit:
        words = f"{words[: limit - 3]}..."
    if words.isprintable():
        return words
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in words
    )


def short(value: object) -> str:
    """The `repr` of a value, cut after 80 characters.

    >>> short("a" * 100)[-5:]
    'aa...'
    """
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
