"""What the command line prints, so that no name or message can steer a terminal."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from esper_fn._text import plain


def say(text: object, *, to_stderr: bool = False) -> None:
    """Prints one line."""
    print(plain(text), file=sys.stderr if to_stderr else sys.stdout, flush=to_stderr)


def complain(text: object) -> None:
    """Prints one line on stderr, without the passwords of addresses in it."""
    say(f"esper: {_without_secrets(str(text))}", to_stderr=True)


def _without_secrets(text: str) -> str:
    if ":/" not in text:
        return text
    try:
        from esper_fn.bus._address import hide_addresses
    except ModuleNotFoundError:
        # Without the extra `bus` no address was meant, but one may have been typed.
        return " ".join(part.partition(":/")[0] for part in text.split(" "))
    return hide_addresses(text)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one safe line below the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and what is wrong, and exits with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {plain(_without_secrets(message))}\n")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(plain, super().format(record).split("\n")))


@contextmanager
def safe_streams() -> Iterator[None]:
    """Within it, what a stream cannot encode is escaped, and so are logs and warnings."""
    streams: list[tuple[Any, str]] = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
            streams.append((stream, str(stream.errors)))
            stream.reconfigure(errors="backslashreplace")
    logger, handler = logging.getLogger("esper_fn"), logging.StreamHandler()
    handler.setFormatter(_Formatter("esper: %(message)s"))
    is_ours = not (logger.hasHandlers())
    if is_ours:
        logger.addHandler(handler)
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, file, line
        complain(f"warning: {message}")

    if shown is _PYTHONS_OWN:
        warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown
        if is_ours:
            logger.removeHandler(handler)
        for stream, errors in streams:
            stream.reconfigure(errors=errors)


_PYTHONS_OWN = warnings.showwarning
