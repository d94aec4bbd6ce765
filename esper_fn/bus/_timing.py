"""Small policies about time; clocks come in from outside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from redis.backoff import EqualJitterBackoff


class ServerTime:
    """The server's clock, estimated from a local clock and the server's last answer.

    Args:
      clock: seconds on a local clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._offset_ms = 0.0

    def update(self, server_ms: int) -> None:
        """Takes over the time that the server has just reported."""
        self._offset_ms = server_ms - self.clock() * 1000

    def now_ms(self) -> int:
        """Milliseconds since 1970 on the server."""
        return int(self._offset_ms + self.clock() * 1000)


_BACKOFF = EqualJitterBackoff(base=0.02, cap=0.5)


def retry_seconds(num_failures: int) -> float:
    """How long to wait after so many failures in a row: it doubles up to a cap, half is random.

    >>> 0 < retry_seconds(50) <= 0.5
    True
    """
    return float(_BACKOFF.compute(min(num_failures, 30)))


class CircuitBreaker:
    """Fails calls at once while a server is known to be down, and lets one try now and then.

    >>> breaker = CircuitBreaker()
    >>> for _ in range(3):
    ...     breaker.fail()
    >>> 0 < breaker.seconds_left() <= 0.5
    True
    """

    def __init__(self) -> None:
        self._num_failures = 0
        self._opens_at = -math.inf

    def seconds_left(self) -> float:
        """Seconds until an attempt is let through; 0 when it is closed."""
        return max(0.0, self._opens_at - time.monotonic())

    def fail(self) -> None:
        """Counts a failure; from the third one in a row on, calls fail for half a second."""
        self._num_failures += 1
        if self._num_failures >= 3:
            self._opens_at = time.monotonic() + 0.5

    def succeed(self) -> None:
        """Closes it."""
        self._num_failures, self._opens_at = 0, -math.inf


class RateLimiter:
    """A bucket of tokens that fills at a constant rate.

    Args:
      per_second: tokens that arrive each second.
      burst: tokens the bucket can hold.

    >>> limiter = RateLimiter(per_second=0.001, burst=2)
    >>> [limiter.allows() for _ in range(3)]
    [True, True, False]
    """

    def __init__(self, *, per_second: float, burst: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._tokens, self._updated_at = burst, time.monotonic()

    def allows(self) -> bool:
        """Takes a token, if there is one."""
        now = time.monotonic()
        tokens = self._tokens + (now - self._updated_at) * self._per_second
        self._tokens, self._updated_at = min(self._burst, tokens), now
        is_allowed = self._tokens >= 1
        self._tokens -= is_allowed
        return is_allowed
