"""How autograd and `torch.compile` meet a site: an autograd function, and a registered operation.

Eager code runs `Grafted`. A compiler sees `esper_kernels.torch.graft` where a kernel serves all
that could live at a site (`_kernels.grow_compiled`); elsewhere `esper_bridge::site_v7`, one
operation whose inside decides from the site's plan what to compute. Either way no stage change
alters what was compiled. The number changes with its arguments and its derivative: compilers cache
programs on disk by the operations' names. It is registered without `torch.library.custom_op`, whose
checks at every call cost more than a site. Its backward operation tells the site what both passes
measured, in memory that no program sees, as programs write over what they have read.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper_kernels import NUM_FORWARD_STATISTICS, NUM_STATISTICS, Chunking
from torch_bridge import _chunks, _dense, _kernels, _layer
from torch_bridge._adapters import Leaves
from torch_bridge._chunks import Pulled, Sums
from torch_bridge._plan import SitePlan

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
    """Without autocast: an adapter computes in the dtype of its input."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


_AS_IT_IS = nullcontext()


Stats = tuple[Tensor, ...]
"""What a forward pass measured of `x`: watched [C, 5] on devices that kernels serve; elsewhere
total and square, [D] each, and sums of r^2, [C], if `_dense` computed the site."""


def _forward(
    plan: SitePlan, axis: int, adapters: Mapping[str, Leaves], x: Tensor, *, watches: bool
) -> tuple[Tensor, Stats, Tensor | None]:
    """`y` with the layout of `x` in memory of its own, what was measured, what `_dense` kept."""
    last = x if axis == -1 else x.movedim(axis, -1)
    calls = _kernels.calls_for(plan, adapters, last) if plan.banks else None
    if calls is not None:
        y, watched = _kernels.forward(calls, plan, adapters, last)
        if axis != -1:
            y = torch.empty_like(x).copy_(y.movedim(-1, axis))
        return y, (watched,), None
    with torch.no_grad(), _plainly(x):
        y = torch.empty_like(x)
        laid = y if axis == -1 else y.movedim(axis, -1)
        if not _is_summed_up(last) and _dense.serves(plan, last):
            found = _dense.forward(plan, adapters, last, laid, watches=watches)
            if found is not None:
                return y, *found
        _layer.forward(plan, adapters, last, laid)
        return y, watch(plan.cut, last) if watches else (), None


def watch(cut: Chunking, x: Tensor) -> Stats:
    """What is measured of `x`, by a kernel where one can."""
    if not _is_summed_up(x):
        return _chunks.totals(x), _chunks.squares(x)
    found = _kernels.watch(cut, x)
    return (_chunks.watch(cut, x) if found is None else found,)


def tell(cut: Chunking, stats: Stats, dy: Tensor) -> Tensor | Sums:
    """What both passes measured of a site without adapters."""
    if not _is_summed_up(dy):
        total, square = stats
        return Sums(dy.numel() // cut.features, total, square, _chunks.squares(dy))
    found = _kernels.watch(cut, dy)
    slope_square = _chunks.slopes(cut, dy) if found is None else found[:, 2]
    return _chunks.tell(stats[0], slope_square)


def _is_summed_up(x: Tensor) -> bool:
    """Whether what is measured is summed up within chunks at once.

    Not on a CPU; there only in tests that let the kernels serve it.
    """
    return x.device.type != "cpu" or x.device.type in _kernels.DEVICES


def _backward(
    plan: SitePlan,
    axis: int,
    adapters: Mapping[str, Leaves],
    x: Tensor,
    dy: Tensor,
    stats: Stats,
    kept: Tensor | None = None,
) -> Pulled:
    last, slope = (x, dy) if axis == -1 else (x.movedim(axis, -1), dy.movedim(axis, -1))
    calls = _kernels.calls_for(plan, adapters, last) if plan.banks else None
    if calls is not None:
        pulled = _kernels.backward(calls, plan, adapters, last, slope, stats[0])
    elif not plan.banks:
        pulled = Pulled(slope, tell(plan.cut, stats, slope), {})
    else:
        with torch.no_grad(), _plainly(x):
            pulled = _pull_adapters(plan, adapters, last, slope, stats, kept)
    return pulled if axis == -1 else pulled._replace(d_x=pulled.d_x.movedim(-1, axis))


def _pull_adapters(
    plan: SitePlan,
    adapters: Mapping[str, Leaves],
    x: Tensor,
    dy: Tensor,
    stats: Stats,
    kept: Tensor | None,
) -> Pulled:
    """Without kernels."""
    cut = plan.cut
    if len(stats) == 3:
        found = _dense.backward(plan, adapters, x, dy, stats, kept)
        if found is not None:
            return found
    if _is_summed_up(x):
        watched = stats[0]
    else:
        watched = _chunks.watched_of(cut, x.numel() // cut.features, *stats[:2])
    return _layer.backward(plan, adapters, x, dy, watched)


class Grafted(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """`y` of a site in eager mode; its backward pass tells the site what both passes measured."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def] # torch's signature
        ctx: Any, site: Seeds | None, plan: SitePlan, axis: int, x, tap, *leaves
    ) -> Tensor:
        """`leaves` are the live banks' parameters; `tap` is what requires a gradient always."""
        del tap
        adapters = _named(plan, leaves)
        y, stats, kept = _forward(plan, axis, adapters, x, watches=any(ctx.needs_input_grad))
        ctx.save_for_backward(x, kept, *stats, *leaves)
        ctx.static = site, plan, axis, len(stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Gradients of `x` and of the adapters."""
        # The guard against second derivatives is spared where none can follow.
        return _pull_twice_guarded(ctx, dy) if torch.is_grad_enabled() else _pull_eager(ctx, dy)


def _pull_eager(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    site, plan, axis, num_stats = ctx.static
    x, kept, *rest = ctx.saved_tensors
    stats, leaves = tuple(rest[:num_stats]), rest[num_stats:]
    pulled = _backward(plan, axis, _named(plan, leaves), x, dy, stats, kept)
    if site is not None:
        site.hear(pulled.told)
    grads = [pulled.d_adapters[bank.bank][name] for bank in plan.banks for name in bank.leaves]
    return None, None, None, pulled.d_x, None, *grads


def grafted(*arguments: Any) -> Tensor:
    """`Grafted.apply(*arguments)`, without what torch looks for in all arguments at every call."""
    if torch._C._are_functorch_transforms_active():
        return Grafted.apply(*arguments)
    found: Tensor = _apply_grafted(*arguments)
    return found


_apply_grafted = super(torch.autograd.Function, Grafted).apply
_pull_twice_guarded = torch.autograd.function.once_differentiable(_pull_eager)


def _named(plan: SitePlan, leaves: Sequence[Tensor]) -> dict[str, Leaves]:
    rest = iter(leaves)
    return {bank.bank: {name: next(rest) for name in bank.leaves} for bank in plan.banks}


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
    """The live adapters out of all parameters of a site, `[P, ...]` each."""
    return {
        bank.bank: _layer.select(
            bank, [(leaf, stacked[at]) for leaf, at in site.places_of[bank.bank]]
        )
        for bank in plan.banks
    }


def _compute(
    x: Tensor, tap: Tensor, stacked: list[Tensor], handle: Tensor, axis: int
) -> tuple[Tensor, list[Tensor]]:
    """`y` and `Stats`, as many as `_promise` says."""
    site, plan = _site(handle)
    watches = bool(plan.banks) or plan.is_watching
    y, stats, _ = _forward(plan, axis, _live(site, plan, stacked), x, watches=watches)
    # Not finite where nobody measured.
    missing = [tap.new_full(shape, torch.inf) for shape in _shapes(x, tap, axis)[len(stats) :]]
    return _own(y, x, x), [*stats, *missing]


def _shapes(x: Tensor, tap: Tensor, axis: int) -> list[tuple[int, ...]]:
    """Of `Stats` with nothing left out."""
    chunks, features = tap.shape[0], x.shape[axis]
    if _is_summed_up(x):
        return [(chunks, NUM_FORWARD_STATISTICS)]
    return [(features,), (features,), (chunks,)]


def _promise(
    x: Tensor, tap: Tensor, stacked: list[Tensor], handle: Tensor, axis: int
) -> tuple[Tensor, list[Tensor]]:
    del stacked, handle
    return torch.empty_like(x), [tap.new_empty(shape) for shape in _shapes(x, tap, axis)]


def _own(y: Tensor, x: Tensor, given: Tensor) -> Tensor:
    """`y` in the layout of `x`, which the fake operation promised, and never `given` itself."""
    if y.data_ptr() != given.data_ptr():
        is_plain = x.is_contiguous() and y.is_contiguous()
        if is_plain or y.stride() == torch.empty_like(x, device="meta").stride():
            return y
    return torch.empty_like(x).copy_(y)


def _compute_backward(
    x: Tensor,
    dy: Tensor,
    stats: list[Tensor],
    stacked: list[Tensor],
    handle: Tensor,
    for_tap: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `x`, of the parameters and, if asked, of the tap, which are 0."""
    site, plan = _site(handle)
    if not plan.banks and not plan.is_watching:
        d_x, grads = _own(dy, x, dy), [torch.zeros_like(leaf) for leaf in stacked]
    else:
        is_dense = len(stats) == 3 and math.isfinite(stats[2].numpy()[0])
        known = tuple(stats if is_dense else stats[:2])
        pulled = _backward(plan, site.axis, _live(site, plan, stacked), x, dy, known)
        told = pulled.told
        # A program reuses the memory of what a site keeps.
        site.hear(told.copy() if isinstance(told, Sums) else told)
        of_bank = {bank.bank: bank for bank in plan.banks}
        grads = [
            _layer.scatter(of_bank[name], pulled.d_adapters[name][leaf], of)
            if name in of_bank
            else torch.zeros_like(of)
            for (name, leaf), of in zip(site.leaf_names, stacked, strict=True)
        ]
        d_x = _own(pulled.d_x, x, dy)
    if for_tap:
        grads.append(stats[-1].new_zeros((plan.cut.chunks, NUM_STATISTICS)))
    return d_x, grads


def _promise_backward(
    x: Tensor,
    dy: Tensor,
    stats: list[Tensor],
    stacked: list[Tensor],
    handle: Tensor,
    for_tap: bool,
) -> tuple[Tensor, list[Tensor]]:
    del dy, handle
    grads = [torch.empty_like(leaf) for leaf in stacked]
    if for_tap:
        grads.append(stats[-1].new_empty((stats[-1].shape[0], NUM_STATISTICS)))
    return torch.empty_like(x), grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, _, stacked, handle, _ = inputs
    ctx.save_for_backward(x, handle, *stacked, *output[1])
    ctx.num_leaves = len(stacked)
    # A compiler drops what nobody reads. The gradient of an adapter is read where one is trained;
    # else the tap's keeps the operation, for a gradient of `x` may vanish on its way.
    ctx.for_tap = not (x.requires_grad and any(of.requires_grad for of in stacked))


def _pull(ctx: Any, dy: Tensor, *of_statistics: Any) -> tuple[Any, ...]:
    del of_statistics  # they have no derivative
    x, handle, *rest = ctx.saved_tensors
    stacked, stats = rest[: ctx.num_leaves], rest[ctx.num_leaves :]
    d_x, grads = site_backward_op(x, dy, stats, stacked, handle, ctx.for_tap)
    return d_x, grads.pop() if ctx.for_tap else None, grads, None, None


_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):  # a graph would keep what one stage computes
    _TAGS.append(torch.Tag.cudagraph_unsafe)


def _register(signature: str, compute: Any, promise: Any) -> Any:
    name = signature.partition("(")[0]
    _LIBRARY.define(signature, tags=tuple(_TAGS))
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", promise, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _LIBRARY.ns), name)


_LIBRARY = torch.library.Library("esper_bridge", "FRAGMENT")
site_op = _register(
    "site_v7(Tensor x, Tensor tap, Tensor[] stacked, Tensor handle, int axis) "
    "-> (Tensor, Tensor[])",
    _compute,
    _promise,
)
site_backward_op = _register(
    "site_backward_v7(Tensor x, Tensor dy, Tensor[] stats, Tensor[] stacked, Tensor handle, "
    "bool for_tap) -> (Tensor, Tensor[])",
    _compute_backward,
    _promise_backward,
)
torch.library.register_autograd("esper_bridge::site_v7", _pull, setup_context=_keep, lib=_LIBRARY)
