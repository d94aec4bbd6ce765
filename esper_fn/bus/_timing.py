"""Small policies about time; clocks come in from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from redis.backoff import EqualJitterBackoff

Clock = Callable[[], float]
"""Seconds on a clock that never goes back."""


class ServerTime:
    """The server's clock, estimated from a local clock and the server's last answer.

    Args:
      clock: seconds on a local clock that never goes back.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._offset_ms = 0.0

    def update(self, server_ms: int) -> None:
        """Takes over the time that the server has just reported."""
        self._offset_ms = server_ms - self._clock() * 1000

    def now_ms(self) -> int:
        """Milliseconds since 1970 on the server."""
        return int(self._offset_ms + self._clock() * 1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How long to wait after a failure: the limit doubles up to a cap, half of the wait is random.

    Attributes:
      base_seconds: the longest wait after the first failure.
      cap_seconds: the longest wait ever.
    """

    base_seconds: float = 0.02
    cap_seconds: float = 0.5

    def delay_seconds(self, num_failures: int) -> float:
        """The wait after so many failures in a row.

        >>> 0 < Retry().delay_seconds(50) <= 0.5
        True
        """
        jitter = EqualJitterBackoff(cap=self.cap_seconds, base=self.base_seconds)
        return float(jitter.compute(min(num_failures, 30)))


@dataclass(kw_only=True, slots=True)
class CircuitBreaker:
    """Fails calls at once while a server is known to be down, and lets one try now and then.

    Args:
      trip_after: failures in a row that open it.
      rest_seconds: how long it stays open before one attempt is let through.
      clock: seconds on a clock that never goes back.

    >>> breaker = CircuitBreaker(trip_after=1, rest_seconds=5, clock=lambda: 0.0)
    >>> breaker.fail()
    >>> breaker.seconds_left()
    5.0
    """

    trip_after: int = 3
    rest_seconds: float = 0.5
    clock: Clock = time.monotonic
    num_failures: int = field(default=0, init=False)
    _opened_at: float | None = field(default=None, init=False)

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once."""
        return self.seconds_left() > 0

    def seconds_left(self) -> float:
        """Seconds until an attempt is let through; 0 when it is closed."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self.rest_seconds - self.clock())

    def fail(self) -> None:
        """Counts a failure."""
        self.num_failures += 1
        if self.num_failures >= self.trip_after:
            self._opened_at = self.clock()

    def succeed(self) -> None:
        """Closes it."""
        self.num_failures = 0
        self._opened_at = None


@dataclass(kw_only=True, slots=True)
class RateLimiter:
    """A bucket of tokens that fills at a constant rate.

    Args:
      per_second: tokens that arrive each second.
      burst: tokens the bucket can hold.
      clock: seconds on a clock that never goes back.

    >>> limiter = RateLimiter(per_second=1, burst=2, clock=lambda: 0.0)
    >>> [limiter.allows() for _ in range(3)]
    [True, True, False]
    """

    per_second: float
    burst: float = 1.0
    clock: Clock = time.monotonic
    _tokens: float | None = field(default=None, init=False)
    _updated_at: float = field(default=0.0, init=False)

    def allows(self) -> bool:
        """Takes a token, if there is one."""
        now = self.clock()
        tokens = self.burst if self._tokens is None else self._tokens
        tokens += max(0.0, now - self._updated_at) * self.per_second
        tokens = min(self.burst, tokens)
        self._updated_at = now
        is_allowed = tokens >= 1
        self._tokens = tokens - is_allowed
        return is_allowed
