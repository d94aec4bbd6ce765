"""Sites of narrow chunks on a CPU in compiled C: `_narrow.c`, built where a compiler is.

A bank of linear bodies is measured, computed and differentiated in one pass each way over the
activations. It is built once a process, into a folder only this user can read, as Triton builds its
launchers; `$ESPER_NATIVE=0` forbids it, and without a compiler `_dense` serves such sites.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_bridge._bodies import Leaves
from torch_bridge._plan import NUM_CHANNELS, SitePlan

SWITCH = "ESPER_NATIVE"
WIDTHS = frozenset(range(8, 65, 8))
MAX_RANK = 64
_LOGGER = logging.getLogger(__name__)
_KEY = "narrow"
"""In `SitePlan.bound`."""
_LIMIT_SECONDS = 60
_ONE, _THREE = ctypes.c_double * 1, ctypes.c_double * 3


class Grown(NamedTuple):
    """What the forward pass measured: sums of x and x^2, [D], and of r^2, [C]; squares of norms."""

    total: Tensor
    square: Tensor
    r_square: Tensor
    norms: tuple[float, ...]
    """Of x, of all `down`, of all `up`."""


class PulledBack(NamedTuple):
    """What the backward pass found; `norm` is the square of the gradient's."""

    d_x: Tensor
    d_leaves: dict[str, Tensor]
    told: Tensor
    """float32[C, 10]: what both passes measured, as `_chunks.Pulled` has it."""
    norm: float


def serves(plan: SitePlan, leaves: Leaves, *given: Tensor) -> bool:
    """Whether the site's only bank, which is all alive and full, is computed here.

    Args:
      plan: of the site.
      leaves: its bodies.
      given: activations, and what was measured of them, whose memory the C functions will read.
    """
    if _KEY not in plan.bound:
        plan.bound[_KEY] = _is_known(plan, leaves)
    # A thread takes whole chunks.
    if not plan.bound[_KEY] or plan.cut.chunks < torch.get_num_threads():
        return False
    every = (*leaves.values(), *given)
    return all(of.dtype == torch.float32 and of.is_contiguous() for of in every)


def _is_known(plan: SitePlan, leaves: Leaves) -> bool:
    if plan.banks[0].form.activation != "none" or leaves.keys() != {"down", "up"}:
        return False
    is_narrow = plan.cut.widest in WIDTHS and leaves["down"].shape[2] <= MAX_RANK
    return is_narrow and _library() is not None


def grow(plan: SitePlan, leaves: Leaves, x: Tensor, y: Tensor) -> Grown:
    """Writes `x + act r` into `y`; only where `serves` says so."""
    features, chunks = plan.cut.features, plan.cut.chunks
    # Apart, as no result of an operation may share memory with another.
    total, square, r_square = map(x.new_empty, (features, features, chunks))
    norms = _THREE()
    _call("esper_grow", plan, leaves, x, (y, total, square, r_square), norms)
    return Grown(total, square, r_square, tuple(norms))


def pull(
    plan: SitePlan, leaves: Leaves, x: Tensor, stats: Sequence[Tensor], dy: Tensor
) -> PulledBack:
    """The exact derivative; only where `serves` says so. `stats`: the sums in `Grown`."""
    told = x.new_empty((plan.cut.chunks, NUM_CHANNELS))
    d_x, down, up = map(torch.empty_like, (dy, leaves["down"], leaves["up"]))
    norms = _ONE()
    _call("esper_pull", plan, leaves, x, (*stats, dy, d_x, down, up, told), norms)
    return PulledBack(d_x, {"down": down, "up": up}, told, norms[0])


def _call(
    name: str, plan: SitePlan, leaves: Leaves, x: Tensor, arrays: tuple[Tensor, ...], norms: Any
) -> None:
    cut, down = plan.cut, leaves["down"]
    sizes = (x.numel() // cut.features, cut.chunks, down.shape[2], cut.widest)
    pointers = [of.data_ptr() for of in (x, plan.gains, down, leaves["up"], *arrays)]
    getattr(_library(), name)(*sizes, *pointers, norms)


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if os.environ.get(SWITCH) == "0" or compiler is None:
        return None
    try:
        return _build(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        _LOGGER.info("narrow chunks go through torch, as they cannot be compiled: %s", error)
        return None


def _build(compiler: str) -> ctypes.CDLL:
    # Linked to torch and not to OpenMP, so that both share torch's threads.
    torch_lib = Path(torch.__file__).parent / "lib"
    with (
        as_file(files(__package__) / "_narrow.c") as source,
        tempfile.TemporaryDirectory(prefix="esper-native-") as folder,
    ):
        thing, library = Path(folder) / "narrow.o", Path(folder) / "narrow.so"
        for arguments in (
            ["-O3", "-march=native", "-fopenmp", "-fPIC", "-c", source, "-o", thing],
            ["-shared", thing, "-o", library, f"-L{torch_lib}", "-Wl,--no-as-needed",
             "-ltorch_cpu"],
        ):  # fmt: skip
            subprocess.run(  # noqa: S603 -- the system's compiler on our own source
                [compiler, *map(str, arguments)],
                check=True,
                capture_output=True,
                timeout=_LIMIT_SECONDS,
            )
        built = ctypes.CDLL(str(library))
    for name, num_arrays in (("esper_grow", 4), ("esper_pull", 8)):
        pointers = [ctypes.c_void_p] * (4 + num_arrays + 1)
        getattr(built, name).argtypes = [*[ctypes.c_int64] * 4, *pointers]
        getattr(built, name).restype = None
    return built
