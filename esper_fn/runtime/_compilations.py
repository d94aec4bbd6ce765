"""Counting what JAX really compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(slots=True)
class CompilationCount:
    """Programs compiled while a `count_compilations` block was open."""

    num_compiled: int = 0


@contextmanager
def count_compilations() -> Iterator[CompilationCount]:
    """A block in which the programs that XLA compiles are counted, by JAX's own events.

    Yields:
      The count, whose `num_compiled` grows while the block is open.

    >>> import jax, jax.numpy as jnp
    >>> with count_compilations() as count:
    ...     _ = jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
    >>> count.num_compiled > 0
    True
    """
    count = CompilationCount()

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == _EVENT:
            count.num_compiled += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
