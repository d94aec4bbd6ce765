"""How compilers meet a site that no kernel of `esper_kernels` serves: as one registered operation.

Its inside decides from the site's plan what to compute, so that no stage change alters what was
compiled. The number in its name changes with its arguments and its derivative: compilers cache
programs on disk by the operations' names. It is registered without `torch.library.custom_op`, whose
checks at every call cost more than a site.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper_kernels import NUM_FORWARD_STATISTICS, NUM_STATISTICS
from esper_kernels.rule_torch import Leaves
from torch_bridge import backends
from torch_bridge._state import SiteState, state_of
from torch_bridge.backends import Residual


def _live(state: SiteState, stacked: Sequence[Tensor]) -> dict[str, Leaves]:
    """The live adapters out of all parameters of a site, `[P, ...]` each."""
    live: dict[str, Leaves] = {}
    for bank in state.plan.banks:
        rows = zip(state.leaves, stacked, strict=True)
        live[bank.name] = {name: bank.select(p) for (own, name), p in rows if own == bank.name}
    return live


def _compute(
    x: Tensor, tap: Tensor, stacked: list[Tensor], number: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`y` and the fields of `Residual` that are worth their memory, as `_promise` says."""
    state = state_of(number)
    plan = state.plan
    live = _live(state, stacked)
    y, residual = backends.forward(plan, axis, live, x, measures=plan.measures)
    chunks = tap.shape[0]
    if residual is None:  # not finite where nobody measured
        residual = Residual(tap.new_full((chunks, NUM_FORWARD_STATISTICS), torch.inf))
    output_square = residual.output_square
    if output_square is None:
        output_square = tap.new_full((chunks,), torch.inf)
    return _owned(y, x, x), residual.statistics, output_square


def _promise(
    x: Tensor, tap: Tensor, stacked: Sequence[Tensor], number: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    del stacked, number, axis
    chunks = tap.shape[0]
    statistics = tap.new_empty((chunks, NUM_FORWARD_STATISTICS))
    return torch.empty_like(x), statistics, tap.new_empty((chunks,))


def _owned(y: Tensor, x: Tensor, source: Tensor) -> Tensor:
    """`y` in the layout of `x`, which the fake operation promised, and never `source` itself."""
    if y.data_ptr() != source.data_ptr():
        is_plain = x.is_contiguous() and y.is_contiguous()
        if is_plain or y.stride() == torch.empty_like(x, device="meta").stride():
            return y
    return torch.empty_like(x).copy_(y)


def _compute_backward(
    x: Tensor,
    dy: Tensor,
    statistics: Tensor,
    output_square: Tensor,
    stacked: list[Tensor],
    number: Tensor,
    for_tap: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `x`, of the parameters and, for a tap, of the tap, which are 0."""
    state = state_of(number)
    plan = state.plan
    if plan.measures:
        residual = Residual(statistics, output_square)
        gradients = backends.backward(plan, state.axis, _live(state, stacked), x, dy, residual)
        # A program reuses the memory of what it has read; these are new.
        state.add(gradients.statistics)
        banks = {bank.name: bank for bank in plan.banks}
        grads = [
            banks[name].scatter(gradients.d_adapters[name][leaf], p)
            if name in banks
            else torch.zeros_like(p)
            for (name, leaf), p in zip(state.leaves, stacked, strict=True)
        ]
        d_x = _owned(gradients.d_x, x, dy)
    else:
        d_x, grads = _owned(dy, x, dy), [torch.zeros_like(p) for p in stacked]
    if for_tap:
        grads.append(statistics.new_zeros((plan.chunking.chunks, NUM_STATISTICS)))
    return d_x, grads


def _promise_backward(
    x: Tensor,
    dy: Tensor,
    statistics: Tensor,
    output_square: Tensor,
    stacked: list[Tensor],
    number: Tensor,
    for_tap: bool,
) -> tuple[Tensor, list[Tensor]]:
    del dy, output_square, number
    grads = [torch.empty_like(leaf) for leaf in stacked]
    if for_tap:
        grads.append(statistics.new_empty((statistics.shape[0], NUM_STATISTICS)))
    return torch.empty_like(x), grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, stacked, number, _ = inputs
    ctx.save_for_backward(x, *output[1:], number, *stacked)
    # A compiler drops what nobody reads. The gradient of an adapter is read where one is trained;
    # else the tap's keeps the operation, for a gradient of `x` may vanish on its way.
    ctx.for_tap = not (x.requires_grad and any(p.requires_grad for p in stacked))


def _pull(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Any, ...]:
    del unused  # what was measured has no derivative
    x, statistics, output_square, number, *stacked = ctx.saved_tensors
    d_x, grads = grow_backward_op(x, dy, statistics, output_square, stacked, number, ctx.for_tap)
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
grow_op = _register(
    "site_v8(Tensor x, Tensor tap, Tensor[] stacked, Tensor number, int axis) "
    "-> (Tensor, Tensor, Tensor)",
    _compute,
    _promise,
)
grow_backward_op = _register(
    "site_backward_v8(Tensor x, Tensor dy, Tensor statistics, Tensor output_square, "
    "Tensor[] stacked, Tensor number, bool for_tap) -> (Tensor, Tensor[])",
    _compute_backward,
    _promise_backward,
)
torch.library.register_autograd("esper_bridge::site_v8", _pull, setup_context=_save, lib=_LIBRARY)
