"""Datasets for the benchmarks and the examples: verified files in, numpy arrays out.

This package knows numpy only; JAX is not imported.
"""

from esper_fn.data._dataset import Dataset, Task
from esper_fn.data._load import load, names
from esper_fn.data._order import batch_indices

__all__ = ["Dataset", "Task", "batch_indices", "load", "names"]
