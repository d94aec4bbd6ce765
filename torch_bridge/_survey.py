"""A survey: growth potential of every chunk, and contributions by ablation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import esper_fn as ef
from torch_bridge._errors import BridgeError

if TYPE_CHECKING:
    from torch_bridge._bridge import Bridge


def survey(bridge: Bridge, closure: Callable[[], Tensor]) -> ef.SurveyInfo:
    """`Bridge.survey`."""
    loss, moments = _measure(bridge, closure)
    chosen = bridge._lifecycle.on_trial()
    group, size = bridge._group, bridge._group.size
    losses = [loss.detach().float()]
    with torch.no_grad(), _eagerly(bridge):
        for seed in chosen:
            if seed >= 0:
                with _without(bridge, seed):
                    losses.append(closure().detach().float())
    told = group.sum(torch.stack(losses)).cpu().numpy() / size
    if not np.isfinite(told[0]):
        warnings.warn(
            f"survey: the held-out loss is {told[0]}, so nothing is learned of any place from it; "
            "look for NaN or infinity in the held-out batch",
            RuntimeWarning,
            stacklevel=3,
        )
    rest = iter(told[1:].tolist())
    missing = [next(rest) if seed >= 0 else 0.0 for seed in chosen]
    return bridge._lifecycle.conclude(moments, float(told[0]), chosen, missing)


@contextmanager
def _eagerly(bridge: Bridge) -> Iterator[None]:
    """Sites look for a survey, and compiled models run as plain Python."""
    shared = bridge._shared
    shared.moments = {}
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        shared.moments = None
        shared.anchors = []
        shared.called.clear()


def _measure(
    bridge: Bridge, closure: Callable[[], Tensor]
) -> tuple[Tensor, list[Sequence[np.ndarray]]]:
    shared = bridge._shared
    with torch.enable_grad(), _eagerly(bridge):
        shared.with_moments = True
        try:
            loss = closure()
            if not isinstance(loss, Tensor) or loss.ndim:
                raise BridgeError(
                    "survey: closure must return the loss, a scalar tensor, got "
                    f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
                )
            if loss.requires_grad and shared.anchors:
                torch.autograd.grad(loss, shared.anchors, allow_unused=True)
        finally:
            shared.with_moments = False
        gathered = shared.moments or {}
    return loss, [_of_site(bridge, site, gathered.get(site.site)) for site in bridge.sites]


def _of_site(bridge: Bridge, site: Any, found: list[Tensor] | None) -> Sequence[np.ndarray]:
    """Moments of the mean loss over all ranks; zero rows where the site was not reached."""
    chunks, wide = site.plan.cut.chunks, site.plan.cut.widest
    if found is None:
        square = (chunks, wide, wide)
        shapes = [(chunks,), square, square, square]
        found = [torch.zeros(shape, device=site.tap.device) for shape in shapes]
    size = bridge._group.size
    sums = bridge._group.sum(torch.cat([of.reshape(-1) for of in found])).cpu().numpy()
    cuts = np.cumsum([of.numel() for of in found])[:-1]
    rows, x_dy, x_x, dy_dy = (
        part.reshape(tuple(of.shape)) for part, of in zip(np.split(sums, cuts), found, strict=True)
    )
    return rows, x_dy / size, x_x, dy_dy / size**2


@contextmanager
def _without(bridge: Bridge, seed: int) -> Iterator[None]:
    """With a seed's gains at 0."""
    first = 0
    for site in bridge.sites:
        chunk = seed - first
        if chunk < site.plan.cut.chunks:
            break
        first += site.plan.cut.chunks
    row = site.plan.gains[chunk]
    before = row.clone()
    row.zero_()
    try:
        yield
    finally:
        row.copy_(before)
