"""What holds a kernel to float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from benchmarks._records import BenchmarkError
from esper_kernels.graft import Adapter, Case, reference_torch


class Arguments(NamedTuple):
    """One set of inputs on the device."""

    x: torch.Tensor
    dy: torch.Tensor
    adapter: Adapter
    slot: torch.Tensor
    gains: torch.Tensor


def to_jax(of: Arguments) -> Arguments:
    return Arguments(*jax.tree.map(jnp.from_dlpack, tuple(of)))


def step(backend: Any, case: Case, of: Arguments) -> Any:
    x, dy, adapter, slot, gains = of
    y, watched = backend.forward(case, x, adapter, slot, gains)
    return y, watched, backend.backward(case, x, dy, adapter, slot, gains, watched)


def forward(backend: Any, case: Case, of: Arguments) -> Any:
    return backend.forward(case, of.x, of.adapter, of.slot, of.gains)


def flat(results: Any) -> list[torch.Tensor]:
    """All results that there are, in their order, as torch sees them."""
    leaves = jax.tree.leaves(jax.tree.map(torch.from_dlpack, results))
    return [leaf for leaf in leaves if leaf is not None]


def error_of(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def hold(
    case: Case,
    of: Arguments,
    found: Mapping[str, Callable[[], Any]],
    *,
    live: torch.Tensor | None = None,
) -> None:
    """Refuses to time what is further from float64 than twice the reference, or differs twice.

    Each of `found` gives `y`, `watched` and, where it has them, `dx`, the adapter's gradients and
    `channels`. With `live` [C] what is measured is compared as zero elsewhere.
    """

    def wide(leaf: torch.Tensor | None) -> torch.Tensor | None:
        return None if leaf is None else leaf.bfloat16().double()

    def masked(results: Any) -> list[torch.Tensor]:
        y, watched, (dx, d_adapter, channels) = results
        if live is not None:
            watched, channels = (torch.where(live[:, None], of, 0) for of in (watched, channels))
        return flat((y, watched, (dx, d_adapter, channels)))

    adapter = Adapter(*(wide(leaf) for leaf in of.adapter))
    exactly = Arguments(of.x.double(), of.dy.double(), adapter, of.slot, of.gains.double())
    true = masked(step(reference_torch, case, exactly))
    usual = masked(step(reference_torch, case, of))
    for name, run in found.items():
        first, again = flat(run()), flat(run())
        for k, (ours, twice) in enumerate(zip(first, again, strict=True)):
            error, allowed = error_of(ours, true[k]), 2 * error_of(usual[k], true[k]) + 2.0**-16
            if not error <= allowed or not torch.equal(ours, twice):
                raise BenchmarkError(
                    f"{name}, result {k}: error {error:.2g}, at most {allowed:.2g} is right; "
                    f"same bits twice: {torch.equal(ours, twice)}."
                )


def hold_in_place(case: Case, of: Arguments, pallas: Any) -> None:
    """Pallas's forms in place; what they leave alone must also keep its bits."""
    live = (of.slot >= 0) & (of.gains != 0).any(dim=1)

    @jax.jit
    def on_jax(of: Arguments) -> Any:
        y, watched = pallas.forward_in_place(case, of.x, of.adapter, of.slot, of.gains)
        rest = pallas.backward_in_place(case, of.x, of.dy, of.adapter, of.slot, of.gains, watched)
        return y, watched, rest

    run = partial(on_jax, to_jax(of))
    hold(case, of, {"pallas in place": run}, live=live)
    dormant = (~live).nonzero()[:, 0]
    for k, (after, before) in enumerate(zip(flat(run())[:3:2], (of.x, of.dy), strict=False)):
        still, unchanged = (
            leaf.view(torch.int16).view(case.rows, case.chunks, -1)[:, dormant]
            for leaf in (after, before)
        )
        if not torch.equal(still, unchanged):
            raise BenchmarkError(f"pallas in place: activation {k} changed where nothing lives.")
