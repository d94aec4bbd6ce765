"""A survey: growth potential of every chunk, and contributions by ablation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

import esper_fn as ef
from torch_bridge._distributed import Group
from torch_bridge._errors import BridgeError
from torch_bridge._shared import Shared, Survey
from torch_bridge._site import Seeds


def survey(
    sites: Sequence[Seeds],
    shared: Shared,
    group: Group,
    closure: Callable[[], Tensor],
) -> ef.SurveyInfo:
    """Measures on held-out data, and lets the lifecycle conclude.

    Args:
      sites: all of the model, in the order of their seeds.
      shared: what they share, with the seeds' state.
      group: the ranks whose measurements are added up.
      closure: runs the model and returns the loss.
    """
    loss, moments = _measure(sites, shared, group, closure)
    chosen = shared.lifecycle.on_trial()
    losses = [loss.detach().float()]
    with torch.no_grad(), _under_way(shared):
        for seed in chosen:
            if seed >= 0:
                with _without(sites, seed):
                    losses.append(closure().detach().float())
    means = group.sum(torch.stack(losses)).cpu().numpy() / group.size
    if not np.isfinite(means[0]):
        warnings.warn(
            f"survey: the held-out loss is {means[0]}, so nothing is learned of any place from it; "
            "look for NaN or infinity in the held-out batch",
            RuntimeWarning,
            stacklevel=3,
        )
    rest = iter(means[1:].tolist())
    missing = [next(rest) if seed >= 0 else 0.0 for seed in chosen]
    return shared.lifecycle.conclude(moments, float(means[0]), chosen, missing)


@contextmanager
def _under_way(shared: Shared) -> Iterator[Survey]:
    """Makes sites look for a survey, and compiled models run as plain Python."""
    shared.survey = Survey()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield shared.survey
    finally:
        shared.survey = None
        shared.called.clear()


def _measure(
    sites: Sequence[Seeds], shared: Shared, group: Group, closure: Callable[[], Tensor]
) -> tuple[Tensor, list[Sequence[np.ndarray]]]:
    with torch.enable_grad(), _under_way(shared) as under_way:
        loss = closure()
        if not isinstance(loss, Tensor) or loss.ndim:
            raise BridgeError(
                "survey: closure must return the loss, a scalar tensor, got "
                f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
            )
        if loss.requires_grad and under_way.probes:
            torch.autograd.grad(loss, under_way.probes, allow_unused=True)
    moments = under_way.moments
    return loss, [_mean_moments(group, site, moments.get(site.site)) for site in sites]


def _mean_moments(group: Group, site: Seeds, own: Tensor | None) -> Sequence[np.ndarray]:
    """Moments of the mean loss over all ranks; zero rows where the site was not reached."""
    chunks, wide = site.plan.chunking.chunks, site.plan.chunking.widest
    if own is None:
        own = torch.zeros(chunks + 3 * chunks * wide**2, device=site.tap.device)
    sums = group.sum(own).cpu().numpy()
    rows, (x_dy, x_x, dy_dy) = sums[:chunks], sums[chunks:].reshape(3, chunks, wide, wide)
    return rows, x_dy / group.size, x_x, dy_dy / group.size**2


@contextmanager
def _without(sites: Sequence[Seeds], seed: int) -> Iterator[None]:
    """Sets a seed's gains to 0 while it lasts."""
    site = next(site for site in reversed(sites) if site.first_seed <= seed)
    row = site.plan.gains[seed - site.first_seed]
    before = row.clone()
    row.zero_()
    try:
        yield
    finally:
        row.copy_(before)
