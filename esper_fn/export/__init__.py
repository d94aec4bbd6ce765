"""The grown network without its growing: files for other programs, and the lineage of its seeds."""

from esper_fn.export._adapters import Adapter, FixedSeeds, acting_adapters, fixed_seeds, fold
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
    "acting_adapters",
    "fixed_seeds",
    "fold",
    "lineage",
    "read_safetensors",
    "read_stablehlo",
    "write_safetensors",
    "write_stablehlo",
]
