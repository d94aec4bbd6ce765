"""Flax modules that mark a site of a model with one line: `nnx.Grow` and `linen.Grow`."""

from esper_fn.flax import linen, nnx

__all__ = ["linen", "nnx"]
