"""Ending at a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """A block in which SIGTERM does not end the process, but is noted.

    Pass what it yields to `fit(should_stop=...)`: the run ends after the segment under way, and
    with `checkpoints=` saves first. A second SIGTERM ends the process at once, as it would have
    without this. Only the main thread may open the block.

    Yields:
      `is_stopping()`, True once the signal has come.

    >>> import os, signal
    >>> with termination() as is_stopping:
    ...     before = is_stopping()
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     before, is_stopping()
    (False, True)
    """
    is_stopping = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        signal.signal(number, signal.SIG_DFL)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: is_stopping
    finally:
        signal.signal(signal.SIGTERM, previous)
