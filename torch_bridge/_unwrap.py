"""Giving the model back: what is linear goes into the host's weights, the rest stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper_kernels import Gains
from esper_kernels.rule_torch import per_adapter
from torch_bridge import _compiler, _nested
from torch_bridge._adapters import Apply, is_built_in
from torch_bridge._forward import grow_output
from torch_bridge._linear import is_transposed_linear
from torch_bridge._plan import BankPlan
from torch_bridge._private import Weights
from torch_bridge._site import Adapter, Seeds, first_tensor
from torch_bridge.backends._layout import gather, scatter


class Site(NamedTuple):
    """A target as it is to become."""

    module: nn.Module
    own: Seeds
    folded: dict[str, Tensor]
    """New values of the module's parameters."""
    rest: list[BankPlan]
    """The banks that stay."""


def unwrap(model: nn.Module, seeds: Sequence[Seeds]) -> set[int]:
    """Folds and removes the seeds of every site.

    Args:
      model: the grown model.
      seeds: of all its sites.

    Returns:
      The ids of forward hooks that stay where they are.
    """
    targets = {
        id(child): module
        for module in model.modules()
        if (child := module._modules.get("seeds")) is not None
    }
    # A target that has been taken out of the model since takes its seeds with it.
    chosen = [(targets[id(own)], own) for own in seeds if id(own) in targets]
    hooks = {id(own): _hook_of(module) for module, own in chosen}
    weights = Weights(model, {hook for hook in hooks.values() if hook is not None})
    with torch.no_grad():
        # All are computed before one is written: what fails must leave the model as it was.
        sites = [_fold(weights, module, own) for module, own in chosen]
        for site in sites:
            _write(site)
    staying = set()
    for site in sites:
        hook = hooks[id(site.own)]
        del site.module._modules["seeds"]
        _compiler.unmark(site.module)
        if site.rest:
            name = _free_name(site.module)
            grown = Grown(site.own, site.rest)
            site.module.add_module(name, grown)
            if hook is None:
                site.module.register_forward_hook(grown.hook)
            else:  # between the hooks that were made before it and those made after
                site.module._forward_hooks[hook] = grown.hook
                staying.add(hook)
    return staying


def _hook_of(module: nn.Module) -> int | None:
    hooks = module._forward_hooks.items()
    return next((key for key, hook in hooks if hook is grow_output), None)


def _free_name(module: nn.Module) -> str:
    """`grown`, unless what an earlier bridge left is called so."""
    name, count = "grown", 1
    while hasattr(module, name):
        count += 1
        name = f"grown{count}"
    return name


def _write(site: Site) -> None:
    for leaf, value in site.folded.items():
        parameter = site.module._parameters[leaf]
        if parameter is None:
            site.module._parameters[leaf] = nn.Parameter(value)
        else:
            parameter.copy_(value)


class Grown(nn.Module):  # type: ignore[misc] # torch is untyped here
    """Adapters that act for good, as plain torch; a child of its target, named `grown`."""

    def __init__(self, site: Seeds, banks: list[BankPlan]) -> None:
        super().__init__()
        self.site, self.axis, self.topology = site.site, site.axis, site.plan.topology
        self._chunking = site.plan.chunking
        self._banks: list[tuple[str, Apply]] = []
        scale = Gains.from_columns(site.plan.gains).output_scale
        for bank in banks:
            rows = [leaf.detach() for leaf in site.rows_of(bank)]
            inner = Adapter(dict(zip(bank.leaves, rows, strict=True)))
            inner.register_buffer("output_scale", scale.index_select(0, bank.chunk))
            for name in ("mask", "chunk", "columns"):
                indices = getattr(bank, name)
                inner.register_buffer(name, None if indices is None else indices.clone())
            inner.is_all = bank.is_all
            self.add_module(bank.name, inner)
            self._banks.append((bank.name, bank.form.apply))

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook of the target."""
        del args
        x, rebuild = first_tensor(self, module, output)
        return rebuild(self(x))

    def forward(self, x: Tensor) -> Tensor:
        """`x + output_scale * adapter(x)`, in the dtype of `x`; numbers that are not finite are
        not added.
        """
        if x.is_nested:
            parts, join = _nested.split(x, is_pointwise=self.topology == "vector")
            return join([self.forward(part) for part in parts])
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._grown(x)
        return self._grown(x)

    def _grown(self, x: Tensor) -> Tensor:
        last = x.movedim(self.axis, -1)
        y = last.float()
        for name, apply in self._banks:
            inner: Any = getattr(self, name)
            leaves = dict(inner.named_parameters())
            u = gather(self._chunking, inner, last)
            r = apply(leaves, u, inner.mask, self.topology).float()
            scale = per_adapter(inner.output_scale, r)
            change = torch.where((scale != 0) & r.isfinite(), scale * r, 0.0)
            # Added over zeros: written in place it could not be exported.
            y = y + scatter(self._chunking, inner, change, y)
        return y.to(x.dtype).movedim(-1, self.axis)


def _fold(weights: Weights, module: nn.Module, own: Seeds) -> Site:
    """What becomes of a target, without changing it."""
    folded: dict[str, Tensor] = {}
    rest = []
    acting = [bank for bank in own.plan.banks if bank.acts]
    axes = _weight_layout(module) if acting and weights.is_plain(module) else None
    for bank in acting:
        values = None if axes is None else _folded(module, axes, own, bank, folded)
        if values is None:
            rest.append(bank)
        else:
            folded |= values
    return Site(module, own, folded, rest)


def _affine(
    own: Seeds, bank: BankPlan, *, is_diagonal: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Features, matrix and shift of `y = x + x matrix + shift` in each chunk, as float64."""
    leaves = dict(zip(bank.leaves, own.rows_of(bank), strict=True))
    chunking = own.plan.chunking
    scales = Gains.from_columns(own.plan.gains).output_scale
    for index, chunk in enumerate(bank.chunk.tolist()):
        start, size = int(chunking.starts[chunk]), int(chunking.sizes[chunk])
        scale = scales[chunk].double()
        adapter = {name: leaf[index].double() for name, leaf in leaves.items()}
        if scale == 0 or not adapter:
            continue
        if is_diagonal:
            matrix = torch.diag(scale * adapter["scale"][:size])
            shift = scale * adapter["shift"][:size]
        else:
            up = adapter["up"][:, :size]
            matrix = scale * (adapter["down"][:size] @ up)
            shift = scale * (adapter["bias"] @ up) if "bias" in adapter else matrix.new_zeros(size)
        yield slice(start, start + size), matrix, shift


class WeightLayout(NamedTuple):
    """How a layer's parameters make its features."""

    axis: int
    """The axis of the features in its weight."""
    is_mixing: bool = True
    """Whether features may be mixed in its weight."""
    is_table: bool = False
    """Whether each row of the weight is an output, so that a shift goes there too."""
    can_shift: bool = True
    """Whether it takes a bias, or has one."""


def _weight_layout(module: Any) -> WeightLayout | None:
    if isinstance(module, nn.Linear):
        return WeightLayout(0)
    if is_transposed_linear(module):
        return WeightLayout(-1)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # In groups, output channels read different inputs.
        return WeightLayout(0, is_mixing=module.groups == 1)
    if isinstance(module, nn.Embedding):
        return WeightLayout(-1, is_table=True)
    if getattr(module, "weight", None) is not None and module.weight.ndim == 1:
        has_shift = getattr(module, "bias", None) is not None
        return WeightLayout(0, is_mixing=False, can_shift=has_shift)
    return None


def _folded(
    module: Any, axes: WeightLayout, own: Seeds, bank: BankPlan, earlier: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """New values of the module's parameters, None if the adapters do not fit into them."""
    is_low_rank = bank.form.activation == "none" and set(bank.leaves) <= {"down", "up", "bias"}
    is_diagonal = is_built_in(bank.form, "scale_shift") or is_built_in(bank.form, "noop")
    if not (is_diagonal or (is_low_rank and axes.is_mixing)):
        return None
    weight = earlier.get("weight", module.weight).detach().clone()
    moved = weight.movedim(axes.axis, -1)
    old = earlier.get("bias", None if axes.is_table else module.bias)
    bias = weight.new_zeros(moved.shape[-1]) if old is None else old.detach().clone()
    for features, matrix, shift in _affine(own, bank, is_diagonal=is_diagonal):
        if axes.is_table:
            is_sound = _add_(moved[..., features], matrix, shift)
        else:
            is_sound = _add_(moved[..., features], matrix, torch.zeros_like(shift))
            is_sound = is_sound and _add_(bias[features], matrix, shift)
        if not is_sound:
            return None
    if axes.is_table or (old is None and not bias.any()):
        return {"weight": weight}
    return {"weight": weight, "bias": bias} if old is not None or axes.can_shift else None


_MOST_LOST = 1 / 8
"""The share of a change that rounding to a weight of 16 bits may take away."""


def _add_(values: Tensor, matrix: Tensor, shift: Tensor) -> bool:
    """Changes values `[..., n]` by `values matrix + shift`, if they can represent the change."""
    wide = values.double()
    change = wide @ matrix + shift
    new = (wide + change).to(values.dtype)
    error = (new.double() - (wide + change)).norm()
    values.copy_(new)
    is_fine = torch.finfo(values.dtype).bits >= 32 or bool(error <= _MOST_LOST * change.norm())
    return is_fine and bool(new.isfinite().all())
