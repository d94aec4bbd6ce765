"""How autograd and `torch.compile` meet a site: an autograd function, and a registered operation.

Eager code runs `Grafted`. A compiler sees `esper_bridge::site`, one operation whose inside decides
from the site's plan what to compute, so that no stage change alters what was compiled.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_bridge import _kernels, _layer
from torch_bridge._bodies import Leaves
from torch_bridge._plan import NUM_WATCHED, SitePlan

if TYPE_CHECKING:
    from torch_bridge._site import Seeds

_SITES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def new_handle(site: object) -> Tensor:
    """A number by which an operation finds a site; a tensor, so that none is compiled in."""
    handle = next(_HANDLES)
    _SITES[handle] = site
    return torch.tensor(handle)


def _plainly(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast: a body computes in the dtype of its input."""
    return torch.autocast(x.device.type, enabled=False)


def _forward(
    plan: SitePlan, axis: int, bodies: Mapping[str, Leaves], x: Tensor, *, watches: bool
) -> tuple[Tensor, Tensor, _layer.Kept | None]:
    """`y` in memory of its own with the layout of `x`, and what was measured of `x`."""
    last = x.movedim(axis, -1)
    with torch.no_grad(), _plainly(x):
        if plan.banks and _kernels.serves(plan, bodies, last):
            rows, watched = _kernels.forward(plan, bodies, last)
            if axis == -1:  # a view may not be changed in place by whoever comes next
                return torch.ops.aten._unsafe_view(rows, x.shape), watched, None
            y = torch.empty_like(x).copy_(rows.reshape(last.shape).movedim(-1, axis))
            return y, watched, None
        y = torch.empty_like(x)
        kept = _layer.forward(plan, bodies, last, y.movedim(axis, -1))
        return y, _layer.watch(plan.cut, last) if watches else _no_measure(plan, x), kept


def _no_measure(plan: SitePlan, x: Tensor) -> Tensor:
    return torch.zeros((plan.cut.chunks, NUM_WATCHED), device=x.device)


def _backward(
    plan: SitePlan,
    axis: int,
    bodies: Mapping[str, Leaves],
    x: Tensor,
    dy: Tensor,
    watched: Tensor,
    kept: _layer.Kept | None = None,
) -> _layer.Pulled:
    last, slope = x.movedim(axis, -1), dy.movedim(axis, -1)
    with torch.no_grad(), _plainly(x):
        if plan.banks and _kernels.serves(plan, bodies, last):
            pulled = _kernels.backward(plan, bodies, last, slope, watched)
        else:
            pulled = _layer.backward(plan, bodies, last, slope, watched, kept)
    return pulled._replace(d_x=pulled.d_x.movedim(-1, axis))


class Grafted(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """`y` of a site in eager mode, with the measurements as the gradient of `tap`."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def] # torch's signature
        ctx: Any, plan: SitePlan, axis: int, names: tuple[tuple[str, ...], ...], x, tap, *leaves
    ) -> Tensor:
        """`names` are the parameters of each live bank, in the order of `leaves`."""
        del tap
        bodies = _named(plan, names, leaves)
        y, watched, kept = _forward(plan, axis, bodies, x, watches=any(ctx.needs_input_grad))
        ctx.save_for_backward(x, watched, *(kept or (None, None)), *leaves)
        ctx.static = (plan, axis, names)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Gradients of `x`, of the tap and of the bodies."""
        plan, axis, names = ctx.static
        x, watched, z, r_square, *leaves = ctx.saved_tensors
        kept = None if z is None else _layer.Kept(z, r_square)
        pulled = _backward(plan, axis, _named(plan, names, leaves), x, dy, watched, kept)
        grads = [
            pulled.d_bodies[bank.bank][name]
            for bank, of in zip(plan.banks, names, strict=True)
            for name in of
        ]
        d_tap = torch.cat([watched, pulled.channels], dim=1)
        return None, None, None, pulled.d_x, d_tap, *grads


def _named(plan: SitePlan, names: Any, leaves: Any) -> dict[str, Leaves]:
    rest = iter(leaves)
    return {
        bank.bank: {name: next(rest) for name in of}
        for bank, of in zip(plan.banks, names, strict=True)
    }


class Anchored(torch.autograd.Function):  # type: ignore[misc]
    """`x` as a tensor that requires a gradient, for hosts that are frozen up to here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tensor) -> Tensor:
        """A copy, so that later work in place meets no view."""
        del ctx, tap
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """`dy`."""
        del ctx
        return dy, None


# --- for compilers ---------------------------------------------------------------------------


def _site(handle: Tensor) -> tuple[Seeds, SitePlan]:
    site = _SITES[int(handle)]
    return site, site.plan


def _live(site: Seeds, plan: SitePlan, stacked: list[Tensor]) -> dict[str, Leaves]:
    """The live bodies out of all parameters of a site, `[P, ...]` each."""
    every = dict(zip(site.leaf_names, stacked, strict=True))
    return {
        bank.bank: _layer.select(
            bank, [(leaf, of) for (name, leaf), of in every.items() if name == bank.bank]
        )
        for bank in plan.banks
    }


@torch.library.custom_op("esper_bridge::site", mutates_args=())
def site_op(x: Tensor, tap: Tensor, stacked: list[Tensor], handle: Tensor) -> tuple[Tensor, Tensor]:
    """`y` and what was measured of `x`."""
    del tap
    site, plan = _site(handle)
    watches = bool(plan.banks) or plan.is_watching
    y, watched, _ = _forward(plan, site.axis, _live(site, plan, stacked), x, watches=watches)
    return _own(y, x, x), watched


@site_op.register_fake
def _(x: Tensor, tap: Tensor, stacked: list[Tensor], handle: Tensor) -> tuple[Tensor, Tensor]:
    del stacked, handle
    return torch.empty_like(x), tap.new_empty((tap.shape[0], NUM_WATCHED))


def _own(y: Tensor, x: Tensor, given: Tensor) -> Tensor:
    """`y` in the layout of `x`, which the fake operation promised, and never `given` itself."""
    promised = torch.empty_like(x)
    if y.stride() == promised.stride() and y.data_ptr() != given.data_ptr():
        return y
    return promised.copy_(y)


@torch.library.custom_op("esper_bridge::site_backward", mutates_args=())
def site_backward_op(
    x: Tensor, dy: Tensor, watched: Tensor, stacked: list[Tensor], handle: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of `x`, of the tap and of the parameters."""
    site, plan = _site(handle)
    grads = [torch.zeros_like(leaf) for leaf in stacked]
    if not plan.banks and not plan.is_watching:
        return _own(dy, x, dy), watched.new_zeros((watched.shape[0], 2 * NUM_WATCHED)), grads
    pulled = _backward(plan, site.axis, _live(site, plan, stacked), x, dy, watched)
    for (name, leaf), grad in zip(site.leaf_names, grads, strict=True):
        for bank in plan.banks:
            if bank.bank == name:
                grad.index_copy_(0, bank.rows, pulled.d_bodies[name][leaf])
    return _own(pulled.d_x, x, dy), torch.cat([watched, pulled.channels], dim=1), grads


@site_backward_op.register_fake
def _(
    x: Tensor, dy: Tensor, watched: Tensor, stacked: list[Tensor], handle: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    del dy, handle
    d_tap = watched.new_empty((watched.shape[0], 2 * NUM_WATCHED))
    return torch.empty_like(x), d_tap, [torch.empty_like(leaf) for leaf in stacked]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, stacked, handle = inputs
    ctx.save_for_backward(x, output[1], handle, *stacked)


def _pull(ctx: Any, dy: Tensor, d_watched: Tensor) -> tuple[Any, ...]:
    del d_watched  # statistics have no derivative
    x, watched, handle, *stacked = ctx.saved_tensors
    d_x, d_tap, grads = site_backward_op(x, dy, watched, stacked, handle)
    return d_x, d_tap, grads, None


site_op.register_autograd(_pull, setup_context=_keep)
