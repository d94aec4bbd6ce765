"""What the bridge raises."""

from __future__ import annotations

from esper_fn.errors import EsperError


class BridgeError(EsperError, ValueError):
    """A model, a target or an optimiser that the bridge cannot work with; says what to do."""
