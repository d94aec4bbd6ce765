"""Loads the data sets of the demonstration from verified files into numpy arrays; needs no JAX."""

from esper_fn._order import batch_indices
from esper_fn.demo.data._dataset import Dataset, Task
from esper_fn.demo.data._load import load, names

__all__ = ["Dataset", "Task", "batch_indices", "load", "names"]
