"""Builds the hosts of the demonstration in plain JAX: an MLP, a CNN and a transformer."""

from esper_fn.demo.hosts._base import Host, count_parameters
from esper_fn.demo.hosts._conv import conv
from esper_fn.demo.hosts._mlp import mlp
from esper_fn.demo.hosts._transformer import transformer

__all__ = ["Host", "conv", "count_parameters", "mlp", "transformer"]
