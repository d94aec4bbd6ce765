"""The grown network without its growing: for other programs, and for whoever asks how it came."""

from esper_fn.export._adapters import Adapter, FixedSeeds, acting, fixed, fold
from esper_fn.export._files import (
    Network,
    read_safetensors,
    read_stablehlo,
    write_safetensors,
    write_stablehlo,
)
from esper_fn.export._lineage import lineage

__all__ = [
    "Adapter",
    "FixedSeeds",
    "Network",
    "acting",
    "fixed",
    "fold",
    "lineage",
    "read_safetensors",
    "read_stablehlo",
    "write_safetensors",
    "write_stablehlo",
]
