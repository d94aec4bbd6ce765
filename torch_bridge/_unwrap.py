"""Giving the model back: what is linear goes into the host's weights, the rest stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_bridge._plan import BankPlan, SitePlan
from torch_bridge._site import Seeds, _first

if TYPE_CHECKING:
    from torch_bridge._bridge import Bridge


class Affine(NamedTuple):
    """`y = x + x matrix + shift` over the features, as float64."""

    matrix: Tensor
    """[D, D]."""
    shift: Tensor
    """[D]."""


def unwrap(bridge: Bridge) -> None:
    """Folds and removes the seeds of every site."""
    modules = dict(bridge.model.named_modules())
    for site in bridge.sites:
        module = modules[site.site]
        with torch.no_grad():
            rest = [of for of in site.plan.banks if of.acts and not _fold(module, site, of)]
        del module._modules["seeds"]
        if rest:
            grown = Grown(site, rest)
            module.add_module("grown", grown)
            module.register_forward_hook(grown.hook)


class Grown(nn.Module):  # type: ignore[misc] # torch is untyped here
    """Bodies that act for good, as plain torch; a child of its target, named `grown`."""

    def __init__(self, site: Seeds, banks: list[BankPlan]) -> None:
        super().__init__()
        self.site, self.axis, self.topology = site.site, site.axis, site.plan.topology
        self._cut = site.plan.cut
        self._banks: list[tuple[str, Callable[..., Tensor], tuple[int, ...], bool]] = []
        for bank in banks:
            act = site.plan.gains[:, 0].index_select(0, bank.chunk)
            leaves = site.rows_of(bank)
            names = site.names_of(bank.bank)
            inner = nn.Module()
            for name, leaf in zip(names, leaves, strict=True):
                inner.register_parameter(name, nn.Parameter(leaf.detach().clone()))
            inner.register_buffer("act", act.clone())
            inner.register_buffer("mask", bank.mask.clone())
            inner.register_buffer("chunk", bank.chunk.clone())
            if bank.columns is not None:
                inner.register_buffer("columns", bank.columns.clone())
            self.add_module(bank.bank, inner)
            self._banks.append((bank.bank, bank.form.apply, bank.slots, bank.is_all))

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook of the target."""
        del args
        x, rebuild = _first(self, module, output)
        return rebuild(self(x))

    def forward(self, x: Tensor) -> Tensor:
        """`x + act * body(x)`."""
        last = x.movedim(self.axis, -1)
        y = last
        for name, apply, slots, is_all in self._banks:
            inner: Any = getattr(self, name)
            u = self._take(inner, is_all, last)
            leaves = dict(inner.named_parameters())
            r = apply(leaves, u, inner.mask, self.topology)
            act = inner.act.reshape(len(slots), *(1,) * (r.ndim - 1))
            # Added over zeros: written in place it could not be exported.
            y = y + self._lay_out(inner, is_all, (act * r.float()).to(x.dtype), y)
        return y.movedim(-1, self.axis)

    def _take(self, inner: Any, is_all: bool, x: Tensor) -> Tensor:
        cut = self._cut
        if not cut.is_even:
            padded = nn.functional.pad(x, (0, 1))
            chunks = padded.index_select(-1, inner.columns).unflatten(-1, (-1, cut.widest))
            return chunks.movedim(-2, 0)
        split = x.unflatten(-1, (cut.chunks, cut.widest))
        return (split if is_all else split.index_select(-2, inner.chunk)).movedim(-2, 0)

    def _lay_out(self, inner: Any, is_all: bool, values: Tensor, like: Tensor) -> Tensor:
        laid = values.movedim(0, -2)
        if not self._cut.is_even:
            wide = like.new_zeros((*like.shape[:-1], like.shape[-1] + 1))
            return wide.index_add(-1, inner.columns, laid.flatten(-2))[..., :-1]
        if is_all:
            return laid.flatten(-2)
        wide = like.new_zeros((*like.shape[:-1], self._cut.chunks, self._cut.widest))
        return wide.index_copy(-2, inner.chunk, laid).flatten(-2)


def _fold(module: nn.Module, site: Seeds, bank: BankPlan) -> bool:
    """Puts a bank's bodies into the module's weights, if both are of a kind that allows it."""
    fold = _folds(module)
    affine = None if fold is None else _affine(site.plan, site, bank)
    if fold is None or affine is None:
        return False
    return fold(module, affine)


def _affine(plan: SitePlan, site: Seeds, bank: BankPlan) -> Affine | None:
    """What the bodies do to the features, where that is linear in each position alone."""
    leaves = dict(zip(site.names_of(bank.bank), site.rows_of(bank), strict=True))
    cut, device = plan.cut, plan.gains.device
    matrix = torch.zeros((cut.features, cut.features), dtype=torch.float64, device=device)
    shift = torch.zeros((cut.features,), dtype=torch.float64, device=device)
    is_low_rank = bank.form.activation == "none" and set(leaves) <= {"down", "up", "bias"}
    if not is_low_rank and set(leaves) != {"scale", "shift"} and leaves:
        return None
    for index, chunk in enumerate(bank.chunk.tolist()):
        start, size = int(cut.starts[chunk]), int(cut.sizes[chunk])
        act = plan.gains[chunk, 0].double()
        here = slice(start, start + size)
        own = {name: leaf[index].double() for name, leaf in leaves.items()}
        if is_low_rank:
            up = own["up"][:, :size]
            matrix[here, here] = act * (own["down"][:size] @ up)
            if "bias" in own:
                shift[here] = act * (own["bias"] @ up)
        elif own:
            matrix[here, here] = torch.diag(act * own["scale"][:size])
            shift[here] = act * own["shift"][:size]
    return Affine(matrix, shift)


def _folds(module: nn.Module) -> Callable[[Any, Affine], bool] | None:
    if type(module) is nn.Linear:
        return _into_linear
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return _into_transposed_linear
    if type(module) in {nn.Conv1d, nn.Conv2d, nn.Conv3d}:
        return _into_conv
    if type(module) is nn.Embedding:
        return _into_embedding
    if type(module) in {nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d}:
        return _into_norm
    return None


def _add_(p: Tensor, change: Tensor) -> None:
    p.copy_((p.double() + change).to(p.dtype))


def _into_bias(module: Any, affine: Affine, device: torch.device, dtype: torch.dtype) -> None:
    if module.bias is not None:
        _add_(module.bias, module.bias.double() @ affine.matrix + affine.shift)
    elif affine.shift.any():
        shift = affine.shift.to(device=device, dtype=dtype)
        module.register_parameter("bias", nn.Parameter(shift))


def _into_linear(module: Any, affine: Affine) -> bool:
    _into_bias(module, affine, module.weight.device, module.weight.dtype)
    _add_(module.weight, affine.matrix.T @ module.weight.double())
    return True


def _into_transposed_linear(module: Any, affine: Affine) -> bool:
    _into_bias(module, affine, module.weight.device, module.weight.dtype)
    _add_(module.weight, module.weight.double() @ affine.matrix)
    return True


def _into_conv(module: Any, affine: Affine) -> bool:
    mixes = affine.matrix.T @ module.weight.double().flatten(1)
    # A convolution in groups cannot mix output channels that read different inputs.
    if module.groups > 1 and not torch.equal(affine.matrix, torch.diag(affine.matrix.diagonal())):
        return False
    _into_bias(module, affine, module.weight.device, module.weight.dtype)
    _add_(module.weight, mixes.reshape(module.weight.shape))
    return True


def _into_embedding(module: Any, affine: Affine) -> bool:
    _add_(module.weight, module.weight.double() @ affine.matrix + affine.shift)
    return True


def _into_norm(module: Any, affine: Affine) -> bool:
    diagonal = affine.matrix.diagonal()
    has_scale = getattr(module, "weight", None) is not None and module.weight.ndim == 1
    has_shift = getattr(module, "bias", None) is not None
    if not has_scale or not torch.equal(affine.matrix, torch.diag(diagonal)):
        return False
    if affine.shift.any() and not has_shift:
        return False
    if has_shift:
        _add_(module.bias, module.bias.double() * diagonal + affine.shift)
    _add_(module.weight, module.weight.double() * diagonal)
    return True
