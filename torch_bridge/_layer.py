"""The three-gain forward and its exact derivative in torch; see `docs/bridge.md`.

For a live chunk `x`, its body's output `r` and the incoming gradient `dy`::

    y       = x + act * r
    d theta = learn * (d r / d theta)^T dy
    d x     = dy + feel * (d r / d x)^T dy

A gain of 0 selects the other operand, and a body that is not finite reaches nothing. Activations
have their features in the last axis here; `Leaves` hold the live bodies of a bank, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_bridge._bodies import PHI, Leaves
from torch_bridge._plan import NUM_CHANNELS, NUM_WATCHED, BankPlan, Cut, SitePlan


class Pulled(NamedTuple):
    """The backward pass of a site."""

    d_x: Tensor
    told: Tensor
    """float32[C, 10]: what the forward pass watched, then gradient_square, num_live,
    output_square, utility, num_errors."""
    d_bodies: Mapping[str, Leaves]


def take(cut: Cut, bank: BankPlan, x: Tensor) -> Tensor:
    """[..., D] as [n, ..., F], zero where padded; a view where every chunk is served."""
    if bank.columns is not None:
        padded = torch.nn.functional.pad(x, (0, 1))
        chunks = padded.index_select(-1, bank.columns).unflatten(-1, (-1, cut.widest))
        return chunks.movedim(-2, 0)
    split = x.unflatten(-1, (cut.chunks, cut.widest))
    if not bank.is_all:
        split = split.index_select(-2, bank.chunk)
    return split.movedim(-2, 0)


def put_(cut: Cut, bank: BankPlan, y: Tensor, values: Tensor) -> None:
    """Writes [n, ..., F] into the chunks of `y`."""
    laid = values.movedim(0, -2)
    if bank.columns is not None:
        is_real = bank.columns < cut.features
        y.index_copy_(-1, bank.columns[is_real], laid.flatten(-2)[..., is_real])
        return
    split = y.unflatten(-1, (cut.chunks, cut.widest))
    if bank.is_all:
        split.copy_(laid)
    else:
        split.index_copy_(-2, bank.chunk, laid)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def per_chunk(cut: Cut, of_features: Tensor) -> Tensor:
    """[D] summed within the chunks, [C]."""
    if cut.is_even:
        return of_features.reshape(cut.chunks, cut.widest).sum(1)
    head = cut.features % cut.chunks * cut.widest
    wide = of_features[:head].reshape(-1, cut.widest).sum(1)
    narrow = of_features[head:].reshape(-1, cut.widest - 1).sum(1)
    return torch.cat([wide, narrow])


def _over_rows(x: Tensor) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def squares(x: Tensor) -> Tensor:
    """[D]: sums of x^2, float32."""
    if x.device.type == "cpu":  # where torch's norm over leading axes takes seven times as long
        beside = x.movedim(-1, 1) if x.ndim > 2 else x
        if x.ndim > 2 and beside.is_contiguous():  # channels of images: the last axis is the pixels
            norms = torch.linalg.vector_norm(beside.flatten(2), dim=2, dtype=torch.float32)
            return norms.square().sum(0)
        return x.float().square().sum(_over_rows(x))
    return torch.linalg.vector_norm(x, dim=_over_rows(x), dtype=torch.float32).square()


def watch(cut: Cut, x: Tensor) -> Tensor:
    """float32[C, 5]: num_values, total, square, num_features, num_dead."""
    rows = x.numel() // cut.features
    sizes = torch.from_numpy(cut.sizes).to(device=x.device, dtype=torch.float32, non_blocking=True)
    if not rows:
        return torch.zeros((cut.chunks, 5), device=x.device)
    if x.ndim == 1:
        x = x[None]
    square = squares(x)
    sums = [
        sizes * rows,
        per_chunk(cut, x.sum(_over_rows(x), dtype=torch.float32)),
        per_chunk(cut, square),
        sizes,
        per_chunk(cut, (square == 0).to(torch.float32)),
    ]
    return torch.stack(sums, dim=1)


def slopes(cut: Cut, dy: Tensor) -> Tensor:
    """float32[C]: the gradient's sums of squares."""
    if not dy.numel():
        return torch.zeros((cut.chunks,), device=dy.device)
    return per_chunk(cut, squares(dy if dy.ndim > 1 else dy[None]))


def tell(watched: Tensor, slope_square: Tensor) -> Tensor:
    """float32[C, 10]: `Pulled.told` with no body alive."""
    told = watched.new_zeros((watched.shape[0], NUM_CHANNELS))
    told[:, :NUM_WATCHED] = watched
    told[:, NUM_WATCHED] = slope_square
    return told


def _per_slot_square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float32).square()


def _outputs(plan: SitePlan, bank: BankPlan, leaves: Leaves, u: Tensor) -> Tensor:
    r = bank.form.apply(leaves, u, bank.mask, plan.topology)
    if bank.columns is None:
        return r
    return torch.where(_mask(bank, r), r, 0.0)


def _mask(bank: BankPlan, like: Tensor) -> Tensor:
    return bank.mask.reshape(len(bank.slots), *(1,) * (like.ndim - 2), -1)


def _add(base: Tensor, gain: Tensor, values: Tensor) -> Tensor:
    """`base + gain * values`, `base` itself where the gain is 0."""
    gain = _column(gain, values)
    wide = base.float() + gain * values.float()
    return torch.where(gain != 0, wide.to(base.dtype), base)


class Kept(NamedTuple):
    """What the fast path hands from forward to backward."""

    z: Tensor | None
    """[n, N, R]: what the activation function takes; None where it is computed again."""
    r_square: Tensor
    """[n]."""


def forward(plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor, y: Tensor) -> Kept | None:
    """Writes the grown activation into `y`."""
    if is_fast(plan, x):
        kept = _forward_fast(plan, plan.banks[0], bodies, x, y)
        if kept is not None:
            return kept
    y.copy_(x)
    for bank in plan.banks:
        if not bank.acts:
            continue
        u = take(plan.cut, bank, x)
        r = _outputs(plan, bank, bodies[bank.bank], u)
        act = plan.gains[:, 0].index_select(0, bank.chunk)
        act = torch.where(_is_finite(r), act, 0.0)
        put_(plan.cut, bank, y, _add(u, act, r))
    return None


def is_fast(plan: SitePlan, x: Tensor) -> bool:
    """Whether all chunks of a site may be computed in few passes.

    On a CPU only, where asking whether a body broke costs no wait.
    """
    if len(plan.banks) != 1:
        return False
    bank = plan.banks[0]
    is_dense = bank.form.activation is not None and bank.is_all and bank.is_full
    return is_dense and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def _inner(bank: BankPlan, leaves: Leaves, rows: Tensor) -> Tensor:
    """`rows down + bias`."""
    bias = leaves.get("bias")
    down = leaves["down"].to(rows.dtype)
    if bias is None:
        return torch.bmm(rows, down)
    return torch.baddbmm(bias.to(rows.dtype)[:, None, :], rows, down)


def _as_rows(of: Tensor) -> Tensor:
    return of.reshape(of.shape[0], -1, of.shape[-1])


def _forward_fast(
    plan: SitePlan, bank: BankPlan, bodies: Mapping[str, Leaves], x: Tensor, y: Tensor
) -> Kept | None:
    u, leaves = _as_rows(take(plan.cut, bank, x)), bodies[bank.bank]
    z = _inner(bank, leaves, u)
    r = torch.bmm(PHI[str(bank.form.activation)](z), leaves["up"].float())
    r_square = _per_slot_square(r)
    if not bool(r_square.isfinite().all()):
        return None
    _add_into(plan.cut, bank, y, u, plan.gains[:, 0], r)
    return Kept(z, r_square)


def _add_into(
    cut: Cut, bank: BankPlan, out: Tensor, base: Tensor, gain: Tensor, values: Tensor
) -> None:
    """`out = base + gain * values` for all chunks, `base` and `values` as rows, in one pass."""
    place = take(cut, bank, out)
    rows = _as_rows(place)
    if rows.data_ptr() == out.data_ptr():
        torch.addcmul(base, gain[:, None, None], values, out=rows)
    else:
        place.copy_(torch.addcmul(base, gain[:, None, None], values).reshape(place.shape))


def _is_finite(values: Tensor) -> Tensor:
    """[n]: by sums, which are not finite where a value is not."""
    return values.flatten(1).sum(1, dtype=torch.float32).isfinite()


def backward(
    plan: SitePlan,
    bodies: Mapping[str, Leaves],
    x: Tensor,
    dy: Tensor,
    watched: Tensor,
    kept: Kept | None = None,
) -> Pulled:
    """Gradients of the input and of the bodies, and what the step measured."""
    told = tell(watched, slopes(plan.cut, dy))
    d_x: Tensor | None = None
    d_bodies: dict[str, Leaves] = {}
    if not dy.numel():
        grads = {b.bank: _zeros(bodies[b.bank]) for b in plan.banks}
        return Pulled(dy, told, grads)
    fed = told[:, NUM_WATCHED].isfinite() & watched[:, 2].isfinite()
    for bank in plan.banks:
        u, slope = take(plan.cut, bank, x), take(plan.cut, bank, dy)
        leaves = bodies[bank.bank]
        gains = plan.gains.index_select(0, bank.chunk)
        if bank.form.activation is not None:
            found = _pull_dense(bank, leaves, u, slope, kept)
        else:
            found = _pull_any(plan, bank, leaves, u, slope)
        r_square, utility, d_leaves, d_u = found
        is_sound = r_square.isfinite()
        is_flowing = is_sound & utility.isfinite()
        for leaf in (*d_leaves.values(), *(() if d_u is None else (d_u,))):
            is_flowing = is_flowing & _is_finite(leaf)
        is_sure = kept is not None and bool(is_flowing.all())
        if d_u is not None:
            feel = torch.where(is_flowing, gains[:, 2], 0.0)
            if is_sure:
                d_x = torch.empty_like(dy)
                _add_into(plan.cut, bank, d_x, _as_rows(slope), feel, _as_rows(d_u))
            else:
                d_x = dy.clone() if d_x is None else d_x
                put_(plan.cut, bank, d_x, _add(slope, feel, d_u))
        learn = torch.where(is_flowing, gains[:, 1], 0.0)
        if not is_sure:
            d_leaves = {
                name: torch.where(
                    _column(learn != 0, leaf), leaf * _column(learn, leaf).to(leaf.dtype), 0.0
                )
                for name, leaf in d_leaves.items()
            }
        d_bodies[bank.bank] = d_leaves
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
        told[:, NUM_WATCHED + 1 :].index_copy_(0, bank.chunk, measured)
    return Pulled(dy if d_x is None else d_x, told, d_bodies)


def _zeros(leaves: Leaves) -> Leaves:
    return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}


Measured = tuple[Tensor, Tensor, Leaves, Tensor | None]
"""Sum of r^2 and utility of each body, its gradients, and those of what it read, if felt."""


def _pull_any(plan: SitePlan, bank: BankPlan, leaves: Leaves, u: Tensor, slope: Tensor) -> Measured:
    def run(leaves: Leaves, u: Tensor) -> Tensor:
        return _outputs(plan, bank, leaves, u)

    r, pull = torch.func.vjp(run, leaves, u)
    d_leaves, d_u = pull(slope)
    r_square = _per_slot_square(r)
    utility = -(slope.float() * r.float()).flatten(1).sum(1)
    return r_square, utility, d_leaves, d_u if bank.feels else None


def _pull_dense(
    bank: BankPlan, leaves: Leaves, u: Tensor, slope: Tensor, kept: Kept | None
) -> Measured:
    """`r = phi(u down + bias) up`; `<dy, r> = <phi(z)^T dy, up>` costs no pass over r."""
    name = str(bank.form.activation)
    rows, dy = _as_rows(u), _as_rows(slope)
    down, up = leaves["down"].to(u.dtype), leaves["up"].to(u.dtype)
    if bank.columns is not None:
        up = torch.where(bank.mask[:, None, :], up, 0.0)
    z = _inner(bank, leaves, rows) if kept is None or kept.z is None else kept.z
    a = PHI[name](z)
    r_square = _per_slot_square(torch.bmm(a, up)) if kept is None else kept.r_square
    d_up = torch.bmm(a.transpose(1, 2), dy)
    utility = -(d_up.float() * up.float()).flatten(1).sum(1)
    d_z = _through(name, z, a, torch.bmm(dy, up.transpose(1, 2)))
    d_leaves = {"down": torch.bmm(rows.transpose(1, 2), d_z), "up": d_up}
    if "bias" in leaves:
        d_leaves["bias"] = d_z.sum(1)
    d_leaves = {name: d_leaves[name].to(leaf.dtype) for name, leaf in leaves.items()}
    d_u = torch.bmm(d_z, down.transpose(1, 2)).reshape(u.shape) if bank.feels else None
    return r_square, utility, d_leaves, d_u


def _through(name: str, z: Tensor, a: Tensor, d_a: Tensor) -> Tensor:
    """`d_a * phi'(z)`."""
    if name == "none":
        return d_a
    if name == "relu":
        return torch.ops.aten.threshold_backward(d_a, a, 0)
    if name == "silu":
        return torch.ops.aten.silu_backward(d_a, z)
    return torch.ops.aten.gelu_backward(d_a, z, approximate="tanh")


def select(bank: BankPlan, stacked: Sequence[tuple[str, Tensor]]) -> Leaves:
    """The rows of the live bodies out of a bank's parameters `[P, ...]`."""
    return {
        name: leaf if bank.is_whole(leaf) else leaf.index_select(0, bank.rows)
        for name, leaf in stacked
    }


def scatter(bank: BankPlan, grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of the live bodies as one of `[P, ...]`."""
    if bank.is_whole(like):
        return grad
    return torch.zeros_like(like).index_copy_(0, bank.rows, grad)


def moments(cut: Cut, x: Tensor, dy: Tensor) -> list[Tensor]:
    """What a survey gathers: rows, `x^T dy`, `x^T x` and `dy^T dy` of every chunk, float32.

    Rows and chunks as in `esper_fn._lattice.Moments`: [C], and three times [C, F, F].
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
