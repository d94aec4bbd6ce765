"""The errors of the kernels."""

from __future__ import annotations

from collections.abc import Mapping


class KernelError(Exception):
    """Root of every error that the kernels raise."""


class ArgumentError(KernelError, ValueError):
    """An argument's dtype, rank, size, device or layout is not what the operation takes."""


class UnavailableError(KernelError, RuntimeError):
    """No implementation that was allowed can serve the call.

    Args:
      operation: what was called.
      refusals: why each candidate could not, by name.
    """

    def __init__(self, operation: str, refusals: Mapping[str, str]) -> None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        super().__init__(
            f"{operation}: none of the allowed implementations can run here ({reasons}); "
            f"implementation='auto' or 'reference' always can"
        )
        self.refusals = dict(refusals)
