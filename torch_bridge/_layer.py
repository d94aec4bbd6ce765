"""The forward of four gains and its exact derivative in torch; see `docs/bridge.md`.

For a live chunk `x`, its adapter's output `r` and the incoming gradient `dy`::

    y       = x + act * r
    d theta = learn * (d r / d theta)^T (dy + damping * r)
    d x     = dy + feel * (d r / d x)^T dy

`damping` is for adapters that learn without acting: the loss does not answer to them, so `<dy, r>`
alone has no minimum. An adapter that is felt is never damped.

A gain of 0 selects the other operand, and an adapter that is not finite reaches nothing.
Activations have their features in the last axis here; `Leaves` hold the live adapters of a bank,
row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esper_kernels import NUM_FORWARD_STATISTICS, Chunking
from torch_bridge._adapters import PHI, Leaves, inner, through
from torch_bridge._chunks import Pulled, column, per_slot_square, put_, slopes, take, tell
from torch_bridge._plan import BankPlan, SitePlan


def outputs(plan: SitePlan, bank: BankPlan, leaves: Leaves, u: Tensor) -> Tensor:
    """What each adapter of a bank adds, zero where padded."""
    r = bank.form.apply(leaves, u, bank.mask, plan.topology)
    if bank.columns is None:
        return r
    return torch.where(_mask(bank, r), r, 0.0)


def _mask(bank: BankPlan, like: Tensor) -> Tensor:
    return bank.mask.reshape(len(bank.slots), *(1,) * (like.ndim - 2), -1)


def _add(base: Tensor, gain: Tensor, values: Tensor) -> Tensor:
    """`base + gain * values`, `base` itself where the gain is 0."""
    gain = column(gain, values)
    wide = base.float() + gain * values.float()
    return torch.where(gain != 0, wide.to(base.dtype), base)


def forward(plan: SitePlan, adapters: Mapping[str, Leaves], x: Tensor, y: Tensor) -> None:
    """Writes the grown activation into `y`."""
    y.copy_(x)
    for bank in plan.banks:
        if not bank.acts:
            continue
        u = take(plan.cut, bank, x)
        r = outputs(plan, bank, adapters[bank.bank], u)
        act = plan.gains[:, 0].index_select(0, bank.chunk)
        act = torch.where(_is_finite(r), act, 0.0)
        put_(plan.cut, bank, y, _add(u, act, r))


def _as_rows(of: Tensor) -> Tensor:
    return of.reshape(of.shape[0], -1, of.shape[-1])


def _is_finite(values: Tensor) -> Tensor:
    """[n]: by sums, which are not finite where a value is not."""
    return values.flatten(1).sum(1, dtype=torch.float32).isfinite()


def backward(
    plan: SitePlan,
    adapters: Mapping[str, Leaves],
    x: Tensor,
    dy: Tensor,
    watched: Tensor,
) -> Pulled:
    """Gradients of the input and of the adapters, and what the step measured."""
    told = tell(watched, slopes(plan.cut, dy))
    d_x: Tensor | None = None
    d_adapters: dict[str, Leaves] = {}
    if not dy.numel():
        grads = {b.bank: _zeros(adapters[b.bank]) for b in plan.banks}
        return Pulled(dy, told, grads)
    fed = told[:, NUM_FORWARD_STATISTICS].isfinite() & watched[:, 2].isfinite()
    for bank in plan.banks:
        u, slope = take(plan.cut, bank, x), take(plan.cut, bank, dy)
        leaves = adapters[bank.bank]
        gains = plan.gains.index_select(0, bank.chunk)
        damping = torch.where(gains[:, 2] == 0, gains[:, 3], 0.0) if bank.is_damped else None
        if bank.form.activation is not None:
            found = _pull_dense(bank, leaves, u, slope, damping)
        else:
            found = _pull_any(plan, bank, leaves, u, slope, damping)
        r_square, utility, d_leaves, d_u = found
        is_sound = r_square.isfinite()
        is_flowing = is_sound & utility.isfinite()
        for leaf in (*d_leaves.values(), *(() if d_u is None else (d_u,))):
            is_flowing = is_flowing & _is_finite(leaf)
        if d_u is not None:
            d_x = dy.clone() if d_x is None else d_x
            feel = torch.where(is_flowing, gains[:, 2], 0.0)
            put_(plan.cut, bank, d_x, _add(slope, feel, d_u))
        learn = torch.where(is_flowing, gains[:, 1], 0.0)
        d_adapters[bank.bank] = {
            name: torch.where(
                column(learn != 0, leaf), leaf * column(learn, leaf).to(leaf.dtype), 0.0
            )
            for name, leaf in d_leaves.items()
        }
        is_fed = fed.index_select(0, bank.chunk)
        measured = torch.stack(
            [
                torch.ones_like(learn),
                torch.where(is_sound, r_square, 0.0),
                torch.where(is_sound, utility, 0.0),
                (is_fed & ~is_flowing).float(),
            ],
            dim=1,
        )
        told[:, NUM_FORWARD_STATISTICS + 1 :].index_copy_(0, bank.chunk, measured)
    return Pulled(dy if d_x is None else d_x, told, d_adapters)


def _zeros(leaves: Leaves) -> Leaves:
    return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}


Measured = tuple[Tensor, Tensor, Leaves, Tensor | None]
"""Sum of r^2 and utility of each adapter, its gradients, and those of what it read, if felt."""


def _pull_any(
    plan: SitePlan,
    bank: BankPlan,
    leaves: Leaves,
    u: Tensor,
    slope: Tensor,
    damping: Tensor | None,
) -> Measured:
    def run(leaves: Leaves, u: Tensor) -> Tensor:
        return outputs(plan, bank, leaves, u)

    r, pull = torch.func.vjp(run, leaves, u)
    d_leaves, d_u = pull(slope if damping is None else _add(slope, damping, r))
    r_square = per_slot_square(r)
    utility = -(slope.float() * r.float()).flatten(1).sum(1)
    return r_square, utility, d_leaves, d_u if bank.feels else None


def _pull_dense(
    bank: BankPlan, leaves: Leaves, u: Tensor, slope: Tensor, damping: Tensor | None
) -> Measured:
    """`r = phi(u down + bias) up`; `<dy, r> = <phi(z)^T dy, up>` costs no pass over r."""
    name = str(bank.form.activation)
    rows, dy = _as_rows(u), _as_rows(slope)
    down, up = leaves["down"].to(u.dtype), leaves["up"].to(u.dtype)
    if bank.columns is not None:
        up = torch.where(bank.mask[:, None, :], up, 0.0)
    z = inner(leaves, rows)
    a = PHI[name](z)
    r = torch.bmm(a, up)
    r_square = per_slot_square(r)
    d_up = torch.bmm(a.transpose(1, 2), dy)
    utility = -(d_up.float() * up.float()).flatten(1).sum(1)
    if damping is not None:
        dy = _add(dy, damping, r)
        d_up = torch.bmm(a.transpose(1, 2), dy)
    d_z = through(name, z, a, torch.bmm(dy, up.transpose(1, 2)))
    d_leaves = {"down": torch.bmm(rows.transpose(1, 2), d_z), "up": d_up}
    if "bias" in leaves:
        d_leaves["bias"] = d_z.sum(1)
    d_leaves = {name: d_leaves[name].to(leaf.dtype) for name, leaf in leaves.items()}
    d_u = torch.bmm(d_z, down.transpose(1, 2)).reshape(u.shape) if bank.feels else None
    return r_square, utility, d_leaves, d_u


def select(bank: BankPlan, stacked: Sequence[tuple[str, Tensor]]) -> Leaves:
    """The rows of the live adapters out of a bank's parameters `[P, ...]`."""
    return {
        name: leaf if bank.is_whole(leaf) else leaf.index_select(0, bank.rows)
        for name, leaf in stacked
    }


def scatter(bank: BankPlan, grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of the live adapters as one of `[P, ...]`."""
    if bank.is_whole(like):
        return grad
    return torch.zeros_like(like).index_copy_(0, bank.rows, grad)


def moments(cut: Chunking, x: Tensor, dy: Tensor) -> list[Tensor]:
    """What a survey gathers: rows, `x^T dy`, `x^T x` and `dy^T dy` of every chunk, float32.

    Rows and chunks as in `esper_fn._layout.Moments`: [C], and three times [C, F, F].
    """

    def rows(of: Tensor) -> Tensor:
        flat = of.reshape(-1, cut.features).float()
        if cut.is_even:
            return flat.reshape(-1, cut.chunks, cut.widest).movedim(1, 0)
        parts = flat.split(cut.sizes.tolist(), dim=1)
        wide = [torch.nn.functional.pad(p, (0, cut.widest - p.shape[1])) for p in parts]
        return torch.stack(wide)

    u, slope = rows(x), rows(dy)
    count = torch.full((cut.chunks,), float(u.shape[1]), device=x.device)
    return [
        count,
        torch.bmm(u.transpose(1, 2), slope),
        torch.bmm(u.transpose(1, 2), u),
        torch.bmm(slope.transpose(1, 2), slope),
    ]
