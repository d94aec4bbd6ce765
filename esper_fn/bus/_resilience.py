"""Small deciders with clocks from outside: when to try again, when to stay quiet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from redis.backoff import EqualJitterBackoff

Clock = Callable[[], float]
"""Seconds, rising."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How long to wait after a failure: doubling, half of it by chance, up to a cap.

    Attributes:
      base_seconds: after the first failure, at most.
      cap_seconds: ever.
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
    """Answers at once while something is known to be down, and tries it now and then.

    Args:
      trip_after: failures in a row that open it.
      rest_seconds: how long it stays open before one attempt is let through.
      clock: seconds, rising.

    >>> breaker = CircuitBreaker(trip_after=1, rest_seconds=5, clock=lambda: 0.0)
    >>> breaker.failed()
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
        """Whether calls are refused."""
        return self.seconds_left() > 0

    def seconds_left(self) -> float:
        """Until an attempt is let through; 0 when closed."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self.rest_seconds - self.clock())

    def failed(self) -> None:
        """Notes a failure."""
        self.num_failures += 1
        if self.num_failures >= self.trip_after:
            self._opened_at = self.clock()

    def succeeded(self) -> None:
        """Closes it."""
        self.num_failures = 0
        self._opened_at = None


@dataclass(kw_only=True, slots=True)
class RateLimiter:
    """A bucket of tokens, filled at a constant rate.

    Args:
      per_second: tokens that arrive each second.
      burst: tokens it holds.
      clock: seconds, rising.

    >>> limiter = RateLimiter(per_second=1, burst=2, clock=lambda: 0.0)
    >>> [limiter.allows() for _ in range(3)]
    [True, True, False]
    """

    per_second: float
    burst: float = 1.0
    clock: Clock = time.monotonic
    num_refused: int = field(default=0, init=False)
    _tokens: float | None = field(default=None, init=False)
    _seen_at: float = field(default=0.0, init=False)

    def allows(self) -> bool:
        """Takes a token, if there is one; counts refusals."""
        now = self.clock()
        held = self.burst if self._tokens is None else self._tokens
        held = min(self.burst, held + max(0.0, now - self._seen_at) * self.per_second)
        self._seen_at = now
        is_allowed = held >= 1
        self._tokens = held - is_allowed
        self.num_refused += not is_allowed
        return is_allowed
