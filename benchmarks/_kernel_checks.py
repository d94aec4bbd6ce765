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


def to_jax(arguments: Arguments) -> Arguments:
    """The same as arrays of JAX, which share its memory."""
    return Arguments(*jax.tree.map(jnp.from_dlpack, tuple(arguments)))


def step(backend: Any, case: Case, arguments: Arguments) -> Any:
    """Forward and backward."""
    x, dy, adapter, slot, gains = arguments
    y, watched = backend.forward(case, x, adapter, slot, gains)
    return y, watched, backend.backward(case, x, dy, adapter, slot, gains, watched)


def forward(backend: Any, case: Case, arguments: Arguments) -> Any:
    """Forward alone."""
    x, _, adapter, slot, gains = arguments
    return backend.forward(case, x, adapter, slot, gains)


def flat(results: Any) -> list[torch.Tensor]:
    """All results that there are, in their order, as torch sees them."""
    leaves = jax.tree.leaves(jax.tree.map(torch.from_dlpack, results))
    return [leaf for leaf in leaves if leaf is not None]


def error_of(result: torch.Tensor, true: torch.Tensor) -> float:
    """The size of the difference over the size of the truth."""
    return float((result.double() - true).norm() / true.norm())


def verify(
    case: Case,
    arguments: Arguments,
    runs: Mapping[str, Callable[[], Any]],
    *,
    live: torch.Tensor | None = None,
) -> None:
    """Refuse to time what is further from float64 than twice the reference, or differs twice.

    Each of `runs` gives `y`, `watched` and, where it has them, `dx`, the adapter's gradients and
    `channels`. With `live` [C] what is measured is compared as zero elsewhere.
    """

    def wide(leaf: torch.Tensor | None) -> torch.Tensor | None:
        return None if leaf is None else leaf.bfloat16().double()

    def masked(results: Any) -> list[torch.Tensor]:
        y, watched, (dx, d_adapter, channels) = results
        if live is not None:
            watched, channels = (
                torch.where(live[:, None], measured, 0) for measured in (watched, channels)
            )
        return flat((y, watched, (dx, d_adapter, channels)))

    adapter = Adapter(*(wide(leaf) for leaf in arguments.adapter))
    x, dy, gains = (leaf.double() for leaf in (arguments.x, arguments.dy, arguments.gains))
    exactly = Arguments(x, dy, adapter, arguments.slot, gains)
    true = masked(step(reference_torch, case, exactly))
    usual = masked(step(reference_torch, case, arguments))
    for name, run in runs.items():
        first, again = flat(run()), flat(run())
        for k, (ours, twice) in enumerate(zip(first, again, strict=True)):
            error, allowed = error_of(ours, true[k]), 2 * error_of(usual[k], true[k]) + 2.0**-16
            if not error <= allowed or not torch.equal(ours, twice):
                raise BenchmarkError(
                    f"{name}, result {k}: error {error:.2g}, at most {allowed:.2g} is right; "
                    f"same bits twice: {torch.equal(ours, twice)}."
                )


def verify_in_place(case: Case, arguments: Arguments, pallas: Any) -> None:
    """Pallas's forms in place; what they leave alone must also keep its bits."""
    live = (arguments.slot >= 0) & (arguments.gains != 0).any(dim=1)

    @jax.jit
    def both(arguments: Arguments) -> Any:
        x, dy, adapter, slot, gains = arguments
        y, watched = pallas.forward_in_place(case, x, adapter, slot, gains)
        rest = pallas.backward_in_place(case, x, dy, adapter, slot, gains, watched)
        return y, watched, rest

    run = partial(both, to_jax(arguments))
    verify(case, arguments, {"pallas in place": run}, live=live)
    dormant = (~live).nonzero()[:, 0]
    pairs = zip(flat(run())[:3:2], (arguments.x, arguments.dy), strict=True)
    for k, (after, before) in enumerate(pairs):
        still, unchanged = (
            leaf.view(torch.int16).view(case.rows, case.chunks, -1)[:, dormant]
            for leaf in (after, before)
        )
        if not torch.equal(still, unchanged):
            raise BenchmarkError(f"pallas in place: activation {k} changed where nothing lives.")
