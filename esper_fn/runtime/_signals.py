"""Being asked to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM into an answer: `is_asked()` is True once the signal has come.

    Give it to `fit(should_stop=...)`: the run ends after the segment under way, and with
    `checkpoints=` saves first. A second SIGTERM ends the process at once, as it would have without
    this. Only the main thread may open the block.

    >>> import os, signal
    >>> with termination() as is_asked:
    ...     before = is_asked()
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     before, is_asked()
    (False, True)
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.SIG_DFL)

    former = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, former)
