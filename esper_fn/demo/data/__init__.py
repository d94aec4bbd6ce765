"""Datasets for the benchmarks and the examples: verified files in, numpy arrays out.

This package knows numpy only; JAX is not imported.
"""

from esper_fn._order import batch_indices
from esper_fn.demo.data._dataset import Dataset, Task
from esper_fn.demo.data._load import load, names

__all__ = ["Dataset", "Task", "batch_indices", "load", "names"]
