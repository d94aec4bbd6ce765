"""The forward hook of every target: from the module's output to the grown one."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from esper_kernels import Chunking
from torch_bridge import _nested, _pure
from torch_bridge._autograd import Grow, RequireGradient
from torch_bridge._errors import BridgeError
from torch_bridge._operations import grow_op
from torch_bridge._shared import Survey
from torch_bridge._site import Seeds, first_tensor
from torch_bridge.backends._statistics import all_statistics, measure_forward, measure_gradient
from torch_bridge.backends._triton import grow_compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grow_output(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of a target.

    It comes to the seeds by the module, not by the hook: so compilers notice when they are gone,
    and when their model rests, though they do not look at hooks.
    """
    del args
    seeds: Any = module._modules["seeds"]
    x, rebuild = first_tensor(seeds, module, output)
    if torch.compiler.is_compiling():
        if not seeds.shared.is_busy and (x.requires_grad or not torch.is_grad_enabled()):
            return None
        return rebuild(_compiled(seeds, x))
    if x.is_nested:
        _count(seeds)
        return rebuild(_each_nested(seeds, module, x))
    _check(seeds, module, x)
    _count(seeds)
    if _pure.is_transformed():
        return rebuild(_transformed(seeds, x)) if seeds.plan.banks else None
    y = _eager(seeds, x)
    return None if y is None else rebuild(y)


def _compiled(seeds: Seeds, x: Tensor) -> Tensor:
    rows = seeds.all_rows()
    if seeds.kernel is not None and seeds.axis == -1:
        leaves = {leaf: p for (_, leaf), p in zip(seeds.leaf_names, rows, strict=True)}
        grown = grow_compiled(seeds.kernel, leaves, x, seeds.slot, seeds.gains, seeds.tap)
        if grown is not None:
            return grown
    y: Tensor = grow_op(x, seeds.tap, rows, seeds.number, seeds.axis)[0]
    return y


def _each_nested(seeds: Seeds, module: nn.Module, x: Tensor) -> Tensor:
    is_pointwise = seeds.plan.topology == "vector"
    parts, join = _nested.split(x, is_pointwise=is_pointwise)
    for part in parts:
        _check(seeds, module, part)
    grown = [_eager(seeds, part) for part in parts]
    if all(part is None for part in grown):
        return x
    return join([part if y is None else y for part, y in zip(parts, grown, strict=True)])


def _transformed(seeds: Seeds, x: Tensor) -> Tensor:
    banks = seeds.plan.banks
    rows = [dict(zip(bank.leaves, seeds.rows_of(bank), strict=True)) for bank in banks]
    return _pure.grow(seeds.plan, seeds.axis, x, rows)


def _eager(seeds: Seeds, x: Tensor) -> Tensor | None:
    """The grown activation; None for `x` itself."""
    if seeds.shared.survey is not None:
        return _surveyed(seeds, seeds.shared.survey, x)
    plan = seeds.plan
    if plan.banks:
        leaves = [leaf for bank in plan.banks for leaf in seeds.rows_of(bank)]
        y: Tensor = Grow.apply(seeds.state, plan, seeds.axis, x, seeds.tap, *leaves)
        return y
    if not torch.is_grad_enabled():
        return None
    # A view that is written to in place loses the hook by which it would be measured.
    is_new = not x.requires_grad or (plan.is_watching and x._is_view())
    y = RequireGradient.apply(x, seeds.tap) if is_new else x
    if plan.is_watching:
        _watch(seeds, y)
    return y if is_new else None


def _watch(seeds: Seeds, x: Tensor) -> None:
    """Measures dormant chunks by a hook of the tensor, which leaves the graph as it was."""
    chunking, axis, state = seeds.plan.chunking, seeds.axis, seeds.state
    with torch.no_grad():
        forward = measure_forward(chunking, x.movedim(axis, -1))

    def measure(dy: Tensor | None) -> None:
        if dy is None:
            raise BridgeError(
                f"target {seeds.site!r}: no gradient comes back to it, as a layer behind it has "
                "no derivative (a quantised one of torch.ao, say). Nothing can learn there: "
                "leave it out by exclude=, or grow the model in floating point and quantise "
                "it after bridge.unwrap()"
            )
        with torch.no_grad():
            gradient_square = measure_gradient(chunking, dy.movedim(axis, -1))
            state.add(all_statistics(forward, gradient_square))

    x.register_hook(measure)


def _surveyed(seeds: Seeds, survey: Survey, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        probe = torch.zeros((), device=x.device, requires_grad=True)
        survey.probes.append(probe)
        x = _GatherMoments.apply(seeds, survey, x, probe)
    plan = seeds.plan
    if not plan.banks:
        return x
    with torch.no_grad():
        leaves = [leaf.detach() for bank in plan.banks for leaf in seeds.rows_of(bank)]
    y: Tensor = Grow.apply(None, plan, seeds.axis, x, seeds.tap.detach(), *leaves)
    return y


class _GatherMoments(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """The identity, whose backward pass gathers a survey's second moments."""

    @staticmethod
    def forward(ctx: Any, seeds: Seeds, survey: Survey, x: Tensor, probe: Tensor) -> Tensor:
        del probe
        ctx.seeds, ctx.survey = seeds, survey
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        seeds: Seeds = ctx.seeds
        gathered: dict[str, Tensor] = ctx.survey.moments
        axis = seeds.axis
        own = _moments(seeds.plan.chunking, x.movedim(axis, -1), dy.movedim(axis, -1))
        gathered[seeds.site] = gathered[seeds.site] + own if seeds.site in gathered else own
        return None, None, dy, torch.zeros((), device=dy.device)


def _moments(chunking: Chunking, x: Tensor, dy: Tensor) -> Tensor:
    """Rows, `x^T dy`, `x^T x` and `dy^T dy` of every chunk, [C] and thrice [C, F, F], in a row."""

    def rows(activation: Tensor) -> Tensor:
        flat = activation.reshape(-1, chunking.features).float()
        if chunking.is_even:
            return flat.reshape(-1, chunking.chunks, chunking.widest).movedim(1, 0)
        parts = flat.split(chunking.sizes.tolist(), dim=1)
        wide = [torch.nn.functional.pad(p, (0, chunking.widest - p.shape[1])) for p in parts]
        return torch.stack(wide)

    u, slope = rows(x), rows(dy)
    count = torch.full((chunking.chunks,), float(u.shape[1]), device=x.device)
    squares = (torch.bmm(u.mT, slope), torch.bmm(u.mT, u), torch.bmm(slope.mT, slope))
    return torch.cat([count, *(square.flatten() for square in squares)])


def _check(seeds: Seeds, module: nn.Module, x: Tensor) -> None:
    width, axis = seeds.plan.chunking.features, seeds.axis
    if x.ndim <= (axis if axis > 0 else 0) or x.shape[axis] != width:
        raise BridgeError(
            f"target {seeds.site!r} ({type(module).__name__}): its output {tuple(x.shape)} has "
            f"no feature axis of {width} at axis {axis}; say features={{{seeds.site!r}: "
            "WIDTH} or choose another target"
        )
    if x.dtype not in DTYPES:
        raise BridgeError(
            f"target {seeds.site!r}: its output is {x.dtype}; seeds need float32, bfloat16 or "
            "float16, so leave the target out, or the model in one of these"
        )
    if x.device != seeds.tap.device:
        raise BridgeError(
            f"target {seeds.site!r}: its output is on {x.device}, its seeds are on "
            f"{seeds.tap.device}; move the whole model (model.to(...)), not single tensors of it"
        )


def _count(seeds: Seeds) -> None:
    called = seeds.shared.called.get(threading.get_ident())
    if called is None or torch._C._current_graph_task_id() != -1:
        return  # a part of the model alone, or a checkpoint's second run
    if seeds.site in called:
        raise BridgeError(
            f"target {seeds.site!r} is called more than once in one forward pass of the model: "
            "its seeds would serve two places at once; leave it out of targets, or call a "
            "module of its own at each place"
        )
    called.add(seeds.site)
