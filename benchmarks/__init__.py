"""Benchmarks: figures that name their conditions, and the targets they are held to."""

from benchmarks._timing import Row, exact, ratio, summarise, time_interleaved

__all__ = ["Row", "exact", "ratio", "summarise", "time_interleaved"]
