"""`graft` in Triton, for CUDA devices and, with TRITON_INTERPRET=1, for tests on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from esper_kernels._records import (
    NUM_BACKWARD_STATISTICS,
    NUM_FORWARD_STATISTICS,
    NUM_GAINS,
    NUM_STATISTICS,
    Adapter,
)
from esper_kernels.graft import reference_torch
from esper_kernels.graft._blocks import (
    NARROW,
    Tiles,
    backward_tiles,
    forward_tiles,
    padded,
    without_engine,
)
from esper_kernels.graft._case import Case
from esper_kernels.graft._stream import Stream, arrivals, current_stream, floats
from esper_kernels.graft._triton_launch import Layout, Tile, are_aligned, on_device_of
from esper_kernels.graft._triton_parts import IS_INTERPRETED
from esper_kernels.graft._triton_plan import (
    Pass,
    backward_launches,
    forward_launches,
    share_entries,
)

MAX_SIDE = 256
MAX_MATRIX = 16384
MAX_SHARE = 1024
"""Entries of a share of gradients up to which the last program of a chunk adds up; beyond, the
programs of a second kernel do so side by side."""


def refuses(case: Case) -> str | None:
    """Tell why Triton cannot serve a case; None if it can."""
    if case.device == "cpu" and not IS_INTERPRETED:
        return (
            "x is on the CPU; Triton needs a CUDA device (TRITON_INTERPRET=1 interprets, for tests)"
        )
    width, rank = padded(case)
    if max(width, rank) > MAX_SIDE or width * rank > MAX_MATRIX:
        return (
            f"a chunk {case.width} wide with rank {case.rank} does not stay on a multiprocessor; "
            f"width and rank may be {MAX_SIDE} at most, their product {MAX_MATRIX} "
            f"(padded to powers of two)"
        )
    return None


class Calls:
    """All passes of one case on one device, with everything that is known before a call.

    Args:
      case: what every call has in common.
      tiles: for all passes; for measurements.
      is_bound: whether a layer makes these calls at every step. Then sums may go into memory that
        the stream keeps; and where chunks are narrow no tile is described by the host, which takes
        it 5 us each, longer than the kernels lose.
    """

    def __init__(self, case: Case, tiles: Tiles | None = None, *, is_bound: bool = False) -> None:
        self.case = case
        self._is_bound = is_bound
        self._opens = is_bound and case.width <= NARROW
        self._forward_tiles = tiles or forward_tiles(case)
        if self._opens:
            self._forward_tiles = without_engine(self._forward_tiles)
        self._backward_tiles = tiles or backward_tiles(case)
        self._sizes = case.rows, case.features, case.chunks, case.slots
        self._layouts: dict[int, Layout] = {}
        self._forward: dict[tuple[bool, bool, bool], Pass] = {}
        self._backward: dict[tuple[bool, bool, bool], Pass] = {}
        self._is_small = share_entries(case) <= MAX_SHARE
        self._no_seeds: tuple[Tensor, Tensor] | None = None

    def forward(
        self, x: Tensor, adapter: Adapter, slot: Tensor, gains: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `y` and `watched`; `x` is contiguous and may have any leading shape."""
        y = torch.empty_like(x)
        with on_device_of(x):
            return y, self._run_forward(x, y, adapter, slot, gains)

    def watch(self, x: Tensor) -> Tensor:
        """Return `watched` of all chunks, whatever lives there."""
        with on_device_of(x):
            slot, gains = self._no_seeds or self._make_no_seeds(x)
            return self._run_forward(x, x, Adapter(x, x), slot, gains)

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        adapter: Adapter,
        slot: Tensor,
        gains: Tensor,
        watched: Tensor,
        *,
        is_beside: bool = False,
    ) -> tuple[Tensor, Adapter, Tensor]:
        """Return `dx`, the adapter's gradients and `channels`, if `is_beside` after `watched`."""
        case, tiles, bank = self.case, self._backward_tiles, _bank(x, adapter)
        tiles = tiles if are_aligned(x, dy) else replace(tiles, is_bulk=False)
        dx = torch.empty_like(x)
        d_adapter = Adapter(*(None if leaf is None else torch.empty_like(leaf) for leaf in adapter))
        gradients = _bank(x, d_adapter)
        columns = NUM_STATISTICS if is_beside else NUM_BACKWARD_STATISTICS
        channels = x.new_empty((case.chunks, columns), dtype=torch.float32)
        with on_device_of(x):
            stream = current_stream(x)
            counters = arrivals(x, case.chunks, stream) if self._is_small else None
            key = tiles.is_bulk, counters is not None, is_beside
            launches = self._backward.get(key)
            if launches is None:
                launches = self._backward[key] = backward_launches(
                    case, tiles, is_counted=key[1], is_beside=is_beside, is_open=self._opens
                )
            main, finish, room = launches
            left = self._scratch(x, room, stream, is_alone=finish is None)
            views, plain = ((), (x, dy, dx)) if self._opens else self._views(tiles, x, dy, dx)
            counters = slot if counters is None else counters
            results = *gradients, channels
            arrays = *plain, *bank, slot, gains, left, watched, *results, counters
            main(views, arrays, self._sizes, stream.name)
            if finish is not None:
                arrays = left, watched, slot, gains, *results
                finish((), arrays, (case.slots,), stream.name)
        return dx, d_adapter, channels

    def _make_no_seeds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Make slots and gains that serve no chunk; remember them unless a graph captures this."""
        chunks = self.case.chunks
        slot = torch.full((chunks,), -1, dtype=torch.int32, device=x.device)
        no_seeds = slot, torch.zeros((chunks, NUM_GAINS), device=x.device)
        if not current_stream(x).is_captured:
            self._no_seeds = no_seeds
        return no_seeds

    def _scratch(self, x: Tensor, size: int, stream: Stream, *, is_alone: bool) -> Tensor:
        """Return memory for the programs' sums: the stream's own only where one kernel does all.

        Another thread may start a kernel on the stream between two of this one.
        """
        if is_alone and self._is_bound:
            return floats(x, size, stream)
        return x.new_empty((size,), dtype=torch.float32)

    def _views(self, tiles: Tiles, *activations: Tensor) -> tuple[Sequence[Tile], Sequence[Tensor]]:
        """Return activations as a kernel takes them: tiles, or arrays."""
        if not tiles.is_bulk:
            return (), activations
        layout = self._layouts.get(tiles.rows)
        if layout is None:
            case = self.case
            sides = [case.rows, case.features], [case.features, 1]
            layout = self._layouts[tiles.rows] = *sides, [tiles.rows, case.width]
        return [Tile(activation, layout) for activation in activations], ()

    def _run_forward(
        self, x: Tensor, y: Tensor, adapter: Adapter, slot: Tensor, gains: Tensor
    ) -> Tensor:
        """Return `watched`, and write `y` unless it is `x`."""
        case, tiles, bank = self.case, self._forward_tiles, _bank(x, adapter)
        tiles = tiles if are_aligned(x, y) else replace(tiles, is_bulk=False)
        stream = current_stream(x)
        counters = arrivals(x, case.chunks, stream) if tiles.splits > 1 else None
        key = tiles.is_bulk, y is x, counters is not None
        launches = self._forward.get(key)
        if launches is None:
            launches = self._forward[key] = forward_launches(
                case, tiles, only_reads=key[1], is_counted=key[2]
            )
        main, finish, room = launches
        watched = x.new_empty((case.chunks, NUM_FORWARD_STATISTICS), dtype=torch.float32)
        left = self._scratch(x, room, stream, is_alone=finish is None) if room else watched
        views, plain = self._views(tiles, x, y)
        counters = slot if counters is None else counters
        arrays = *plain, *bank, slot, gains, left, watched, counters
        main(views, arrays, self._sizes, stream.name)
        if finish is not None:
            finish((), (left, watched), (case.rows,), stream.name)
        return watched


def _bank(x: Tensor, adapter: Adapter) -> list[Tensor]:
    """Return the adapter's matrices, and anything for those it lacks, which no kernel reads."""
    return [x if leaf is None else leaf for leaf in adapter]


@lru_cache(maxsize=1024)
def calls(
    case: Case, device: torch.device, tiles: Tiles | None = None, *, is_bound: bool = False
) -> Calls:
    """Return the passes of a case, remembered as is what Triton compiles for them."""
    del device  # the one for which they are compiled
    return Calls(case, tiles, is_bound=is_bound)


def bind(case: Case, x: Tensor) -> Calls | reference_torch.Calls:
    """Return what serves calls like this one."""
    if not case.rows:
        return reference_torch.bind(case, x)
    # Registered operations keep nothing: a compiler may run them in a graph's own memory.
    return calls(case, x.device, is_bound=True)


def forward(
    case: Case,
    x: Tensor,
    adapter: Adapter,
    slot: Tensor,
    gains: Tensor,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `y` and `watched`; see the README beside this file. `tiles` is for measurements."""
    if case.rows == 0:
        return reference_torch.forward(case, x, adapter, slot, gains)
    return calls(case, x.device, tiles).forward(x, adapter, slot, gains)


def watch(case: Case, x: Tensor) -> Tensor:
    """Return `watched` of all chunks of an activation; nothing else of the case matters."""
    return calls(case, x.device).watch(x) if case.rows else reference_torch.watch(case, x)


def backward(
    case: Case,
    x: Tensor,
    dy: Tensor,
    adapter: Adapter,
    slot: Tensor,
    gains: Tensor,
    watched: Tensor,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Adapter, Tensor]:
    """Return `dx`, the adapter's gradients and `channels`; see the README beside this file."""
    if case.rows == 0:
        return reference_torch.backward(case, x, dy, adapter, slot, gains, watched)
    return calls(case, x.device, tiles).backward(x, dy, adapter, slot, gains, watched)
