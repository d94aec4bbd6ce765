"""Draws the figures of a run; each function returns a `matplotlib.figure.Figure`."""

from esper_fn.report._bars import baseline_bars
from esper_fn.report._curves import accuracy_curves, loss_curves, parameters_over_time
from esper_fn.report._maps import alpha_curves, stage_map, where_it_grew

__all__ = [
    "accuracy_curves",
    "alpha_curves",
    "baseline_bars",
    "loss_curves",
    "parameters_over_time",
    "stage_map",
    "where_it_grew",
]
