"""The GPU kernels and their rivals on one NVIDIA GPU: first correct, then timed.

Rows of the headline size are 16,384 x 4,096 in bfloat16, 64 chunks of 64 with a relu adapter each,
all live, unless the name says otherwise. `step` is forward and backward. A ratio to the copy is to
the device-to-device copy of one such activation; to the floor, to two and a half copies: x and dy
read twice and once, y and dx written.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch lives on the device too

import jax
import jax.numpy as jnp
import torch

from benchmarks._device_timing import time_jax, time_torch
from benchmarks._kernel_checks import (
    Arguments,
    forward,
    step,
    to_jax,
    verify,
    verify_in_place,
)
from benchmarks._records import BenchmarkError
from benchmarks._timing import Row, exact, ratio, summarise
from esper_kernels.graft import Adapter, Case, check, reference_jax, reference_torch, triton_cuda
from esper_kernels.graft._specs import Spec
from esper_kernels.graft.jax import explain as explain_jax

NUM_SETS = 3
ACTIVATION_PASSES = 2.5
Rows = dict[str, Row]
Calls = list[Callable[[], object]]


def measure(*, quick: bool) -> Mapping[str, Row]:
    """All rows; `quick` takes few samples."""
    if not torch.cuda.is_available():
        raise BenchmarkError("kernels needs an NVIDIA GPU, and torch sees none.")
    repeats = 5 if quick else 30
    rows: Rows = {}
    for rank in (16, 64):
        rows |= _headline(rank, repeats=repeats)
    rows |= _in_place(repeats=repeats)
    rows |= _small(repeats=repeats)
    rows |= _many_seeds(repeats=repeats)
    return rows


def _draw(spec: Spec, seed: int, live: int | None = None) -> Arguments:
    source = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, over: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=source, device="cuda") / over

    width, rank = spec.width, spec.rank
    slot = torch.randperm(spec.chunks, generator=source, device="cuda").int()
    slot[slot >= (spec.slots if live is None else live)] = -1
    return Arguments(
        x=normal(spec.rows, spec.features).bfloat16(),
        dy=normal(spec.rows, spec.features).bfloat16(),
        adapter=Adapter(
            down=normal(spec.slots, width, rank, over=width**0.5),
            up=normal(spec.slots, rank, width, over=rank**0.5),
            bias=normal(spec.slots, rank),
        ),
        slot=slot,
        gains=torch.nn.functional.pad(
            torch.rand((spec.chunks, 3), generator=source, device="cuda") + 0.1, (0, 1)
        ),
    )


def _case(arguments: Arguments) -> Case:
    x, _, adapter, slot, gains = arguments
    name = torch.cuda.get_device_name()
    return check(x, adapter, slot, gains, activation="relu", device=name)


def _each(function: Callable[[Arguments], object], sets: Sequence[Arguments]) -> Calls:
    return [partial(function, arguments) for arguments in sets]


def _headline(rank: int, *, repeats: int) -> Rows:
    spec = Spec(name="headline", rows=16384, features=4096, chunks=64, slots=64, rank=rank)
    sets = [_draw(spec, seed) for seed in range(NUM_SETS)]
    case = _case(sets[0])
    runs = {"triton": partial(step, triton_cuda, case, sets[0])}
    pallas = _pallas(sets[0])
    if pallas is not None:
        runs["pallas"] = partial(jax.jit(partial(step, pallas, case)), to_jax(sets[0]))
    verify(case, sets[0], runs)
    torch.cuda.empty_cache()

    def reference_forward(arguments: Arguments) -> Any:
        return forward(reference_torch, case, arguments)

    def reference_step(arguments: Arguments) -> Any:
        return step(reference_torch, case, arguments)

    reference = {"forward": reference_forward, "step": reference_step}
    compiled = {name: torch.compile(function) for name, function in reference.items()}
    with ThreadPoolExecutor() as pool:
        programs = pool.submit(_programs, case, sets[0])
        for function in compiled.values():
            function(sets[0])
        programs.result()
    copies = [partial(torch.empty_like(each.x).copy_, each.x) for each in sets]
    samples = time_torch(
        {
            "copy": copies,
            "forward_triton": _each(partial(forward, triton_cuda, case), sets),
            "step_triton": _each(partial(step, triton_cuda, case), sets),
        },
        {f"{name}_eager": _each(function, sets) for name, function in reference.items()}
        | {f"{name}_compile": _each(function, sets) for name, function in compiled.items()},
        repeats=repeats,
    )
    samples |= _time_programs(programs.result(), sets, repeats=repeats)
    return _headline_rows(rank, spec, samples)


def _pallas(arguments: Arguments) -> Any:
    """The backend where it can run here, else None."""
    x, _, adapter, slot, gains = to_jax(arguments)
    if "pallas" in explain_jax(x, adapter, slot, gains, activation="relu").refusals:
        return None
    from esper_kernels.graft import pallas_mosaic_gpu

    return pallas_mosaic_gpu


def _programs(case: Case, arguments: Arguments) -> dict[str, Any]:
    """XLA's and Pallas's forward and step, compiled side by side."""
    backends = {"xla": reference_jax, "pallas": _pallas(arguments)}
    functions = {
        f"{name}_{backend}": partial(function, module, case)
        for backend, module in backends.items()
        if module is not None
        for name, function in (("forward", forward), ("step", step))
    }
    inputs = to_jax(arguments)
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda f: jax.jit(f).lower(inputs).compile(), functions.values())
        return dict(zip(functions, compiled, strict=True))


def _time_programs(
    programs: Mapping[str, Any], sets: Sequence[Arguments], *, repeats: int
) -> dict[str, list[float]]:
    inputs = [(to_jax(arguments),) for arguments in sets]
    return {name: time_jax(run, inputs, repeats=repeats) for name, run in programs.items()}


def _headline_rows(rank: int, spec: Spec, samples: Mapping[str, list[float]]) -> Rows:
    activation_bytes = spec.rows * spec.features * 2
    passes = {"copy": 2, "forward": 2, "step": 5}
    copy = samples["copy"]
    shape = f"{spec.rows} x {spec.features} bfloat16, {spec.chunks} chunks, R = {rank}"
    rate = 2 * activation_bytes / median(copy)
    rows: Rows = {}
    for name, seconds in samples.items():
        counted = passes[name.split("_")[0]] * activation_bytes
        per_second = counted / median(seconds)
        rows[f"{name}_r{rank}"] = summarise(
            seconds,
            "us",
            shape=shape,
            counted_bytes=counted,
            bytes_per_second=per_second,
            percent_of_copy_rate=100 * per_second / rate,
            timer="CUPTI" if name.endswith(("xla", "pallas")) else "CUDA events",
        )
    floor = [ACTIVATION_PASSES * seconds for seconds in copy]
    for ours in ("triton", "pallas"):
        if f"forward_{ours}" not in samples:
            continue
        forward, step = samples[f"forward_{ours}"], samples[f"step_{ours}"]
        rows[f"forward_{ours}_over_copy_r{rank}"] = ratio(forward, copy)
        rows[f"step_{ours}_over_floor_r{rank}"] = ratio(step, floor)
        for rival in ("eager", "compile", "xla"):
            rows[f"forward_{rival}_over_{ours}_r{rank}"] = ratio(
                samples[f"forward_{rival}"], forward
            )
            rows[f"step_{rival}_over_{ours}_r{rank}"] = ratio(samples[f"step_{rival}"], step)
    return rows


def _in_place(*, repeats: int) -> Rows:
    """Pallas's forms in place, which sites of several banks use."""
    spec = Spec(name="in_place", rows=16384, features=4096, chunks=64, slots=64, rank=16)
    # Four chunks alone would stay in the cache of three sets.
    whole, few = ([_draw(spec, seed, live) for seed in range(3 * NUM_SETS)] for live in (None, 4))
    case, pallas = _case(whole[0]), _pallas(whole[0])
    if pallas is None:
        return {}
    verify_in_place(case, few[0], pallas)
    torch.cuda.empty_cache()

    def small(arguments: Arguments) -> Arguments:
        """In place again and again: gains so small that x stays what it is."""
        return arguments._replace(gains=1e-4 * arguments.gains)

    # Four chunks read and written 16 bytes at a time, and nothing else done.
    wide = [s.x.view(torch.complex128).view(spec.rows, 4, 16, -1)[:, :, 0] for s in whole]
    bare = time_torch({"pass": [partial(x.add_, 0) for x in wide]}, {}, repeats=repeats)["pass"]
    all_live, four = (
        _time_in_place(pallas, case, [*map(small, sets)], repeats) for sets in (whole, few)
    )
    return {
        "in_place_pass_4_of_64": summarise(bare, "us"),
        "in_place_pallas_4_of_64_r16": summarise(four, "us"),
        "in_place_pallas_all_r16": summarise(all_live, "us"),
        "in_place_pallas_4_of_64_over_pass_r16": ratio(four, bare),
    }


def _time_in_place(
    backend: Any, case: Case, sets: Sequence[Arguments], repeats: int
) -> list[float]:
    """Each call gives up one activation of a ring and gets it back."""
    function = jax.jit(partial(backend.forward_in_place, case), donate_argnums=0)
    ring = deque((jnp.copy(x), rest) for x, _, *rest in map(to_jax, sets))

    class Turn(jax.stages.Compiled):
        """The timer calls what is compiled as it is; anything else it would trace."""

        def __init__(self) -> None: ...

        def __call__(self) -> Any:
            x, rest = ring.popleft()
            y, watched = function(x, *rest)
            ring.append((y, rest))
            return watched

    return time_jax(Turn(), [()] * len(sets), repeats=repeats)


def _small(*, repeats: int) -> Rows:
    spec = Spec(name="small", rows=32, features=512, chunks=8, slots=8, rank=16)
    arguments = _draw(spec, 0)
    case = _case(arguments)
    works = {"small": [partial(forward, triton_cuda, case, arguments)]}
    samples = time_torch(works, {}, repeats=repeats, inner=100)
    rows = {"small_forward_triton": summarise(samples["small"], "us", shape="32 x 512, 8 chunks")}
    seconds = _time_programs(_programs(case, arguments), [arguments], repeats=repeats)
    for name in ("xla", "pallas"):
        if f"forward_{name}" in seconds:
            rows[f"small_forward_{name}"] = summarise(seconds[f"forward_{name}"], "us")
    return rows


def _many_seeds(*, repeats: int) -> Rows:
    """One training step's seed work on a host of 48 layers, 4 of 256 chunks live in each."""
    layers, rows_of_batch = 48, 4096
    spec = Spec(name="many", rows=rows_of_batch, features=4096, chunks=256, slots=8, rank=16)
    sets = [_draw(spec, layer, live=4) for layer in range(layers)]
    case = _case(sets[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(triton_cuda, case, sets[0])
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    scratch = extra - 2 * spec.rows * spec.features * 2
    banks = sum(leaf.nbytes for each in sets for leaf in each.adapter if leaf is not None)
    works = {"step": _each(partial(step, triton_cuda, case), sets)}
    samples = time_torch(works, {}, repeats=max(3, repeats // 3), inner=layers)
    facts = {
        "seeds": layers * spec.chunks,
        "layers": layers,
        "batch_rows": rows_of_batch,
        "live_adapters": layers * 4,
    }
    return {
        "seed_work_12288_seeds_triton": summarise(
            [layers * seconds for seconds in samples["step"]], "ms", **facts
        ),
        "memory_of_banks_12288_seeds": exact(banks / 2**20, "MiB", **facts),
        "memory_of_scratch_12288_seeds": exact(scratch / 2**20, "MiB", **facts),
    }
