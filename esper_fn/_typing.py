"""The glossary of axis letters and the array types written beside every field.

| letter | axis |
|---|---|
| S | seeds, all sites flat: site by site, layer by layer, chunk by chunk |
| C | chunks of one site |
| D | features of one site's activation |
| F | features of one chunk (the widest one where `D` does not divide evenly) |
| L | layers of a site that stands inside a scanned stack |
| P | slots of one bank |
| Q | slots of all banks, flat |
| B | blueprints of a layout |
| R | inner width of an adapter |
| K | telemetry channels of a tap |
| M | commands of one step |
| V | seeds measured by ablation in one survey |
| T | steps |
| N | seeds of a site's layer whose directions a survey remembers |
| U | directions remembered of a seed |
| H | snapshots in the ring of a roll-back |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, PRNGKeyArray, UInt8

Params: TypeAlias = Any
"""Any pytree of arrays."""

Adapters: TypeAlias = Mapping[str, Mapping[str, Params]]
"""site name -> blueprint name -> parameters stacked over the bank's slots, `[P, ...]`."""

Implementation: TypeAlias = Literal["auto", "loops", "pallas", "reference"]
"""What computes the adapters of a site; see `Growth`."""

Key: TypeAlias = PRNGKeyArray
DType: TypeAlias = Any
Scalar: TypeAlias = jax.Array

__all__ = [
    "Adapters",
    "Array",
    "Bool",
    "DType",
    "Float",
    "Float32",
    "Implementation",
    "Int8",
    "Int32",
    "Key",
    "Params",
    "Scalar",
    "UInt8",
]
