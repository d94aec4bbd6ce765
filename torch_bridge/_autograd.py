"""How autograd meets a site in eager mode."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper_kernels.rule_torch import Leaves
from torch_bridge import backends
from torch_bridge._plan import SitePlan
from torch_bridge._state import SiteState
from torch_bridge.backends import Residual


class Grow(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """`y` of a site; its backward pass adds what both passes measured to the site's state."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def] # torch's signature
        ctx: Any, state: SiteState | None, plan: SitePlan, axis: int, x, tap, *leaves
    ) -> Tensor:
        """`leaves` are the live banks' parameters; `tap` is what requires a gradient always."""
        del tap
        measures = any(ctx.needs_input_grad)
        y, residual = backends.forward(plan, axis, _named(plan, leaves), x, measures=measures)
        ctx.static = state, plan, axis
        ctx.save_for_backward(x, *(residual or ()), *leaves)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Gradients of `x` and of the adapters."""
        # The guard against second derivatives is spared where none can follow.
        return _pull_once(ctx, dy) if torch.is_grad_enabled() else _pull(ctx, dy)


def _pull(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    state, plan, axis = ctx.static
    x, *saved = ctx.saved_tensors
    residual, leaves = Residual(*saved[:_NUM_RESIDUALS]), saved[_NUM_RESIDUALS:]
    gradients = backends.backward(plan, axis, _named(plan, leaves), x, dy, residual)
    if state is not None:
        state.add(gradients.statistics)
    grads = [gradients.d_adapters[bank.name][leaf] for bank in plan.banks for leaf in bank.leaves]
    return None, None, None, gradients.d_x, None, *grads


_pull_once = torch.autograd.function.once_differentiable(_pull)
_NUM_RESIDUALS = len(Residual._fields)


def _named(plan: SitePlan, leaves: Sequence[Tensor]) -> dict[str, Leaves]:
    rest = iter(leaves)
    return {bank.name: {leaf: next(rest) for leaf in bank.leaves} for bank in plan.banks}


class RequireGradient(torch.autograd.Function):  # type: ignore[misc]
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
