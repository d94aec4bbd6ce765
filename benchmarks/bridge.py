"""The bridge to PyTorch: what dormant seeds cost, and live ones beside PEFT's LoRA.

One sample is 16 training steps (forward, backward, optimiser, `bridge.step`), so that it holds
exactly one step in which dormant chunks are measured; 4 where all are live, on a CPU.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks._bridge_hosts import Cnn, Gpt, adapted, grown, stepper
from benchmarks._timing import Row, exact, ratio, summarise, time_interleaved
from esper_kernels.torch import analyse_kernels_once

STEPS = 16


def measure(*, quick: bool) -> Mapping[str, Row]:
    """The GPU's rows where there is one, else the CPU's; `quick` takes few samples."""
    parts: dict[str, Callable[[], dict[str, Row]]] = {}
    if torch.cuda.is_available():
        parts["gpu"] = lambda: _gpu_rows(repeats=2 if quick else 4, is_compiled=True)
    else:
        parts["cnn"] = lambda: _cnn_rows(rounds=2 if quick else 10, repeats=1 if quick else 4)
        parts["cpu"] = lambda: _cpu_rows(repeats=2 if quick else 30, is_compiled=not quick)
    rows: dict[str, Row] = {}
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            rows |= part()
        except Exception:  # a part that fails must not cost the others; `check` misses its rows
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return rows


def _ways(
    optimizer_of: Callable[..., Any], batches: Any, loss_of: Any, steps: int
) -> Callable[..., Any]:
    def way(of: Any, bridge: Any = None, is_compiled: bool = False) -> Callable[[], object]:
        optimizer = optimizer_of(of.parameters())
        run = torch.compile(of) if is_compiled else of
        return stepper(run, optimizer, batches, loss_of, bridge, steps=steps)

    return way


def _cnn_rows(*, rounds: int, repeats: int) -> dict[str, Row]:
    """The convolutional host of Fashion-MNIST, batches of 128, on the CPU."""
    torch.manual_seed(0)
    bare = Cnn()
    batches = [(torch.randn(128, 1, 28, 28), torch.randint(10, (128,))) for _ in range(4)]

    def loss_of(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    samples: dict[str, list[float]] = {"bare": [], "dormant": []}
    for turn in range(rounds):
        # Where a model's arrays happen to lie makes 2 % here, so every round has fresh ones.
        runners: dict[str, Callable[[], object]] = {}
        seeds = 0
        for name in ("bare", "dormant") if turn % 2 else ("dormant", "bare"):
            model, bridge = copy.deepcopy(bare), None
            if name == "dormant":
                bridge = grown(model, 16, 4, ("conv1", "conv2", "hidden"), is_live=False, lag=0)
                seeds = bridge.layout.num_seeds
            adamw = torch.optim.AdamW(model.parameters(), 1e-4)
            runners[name] = stepper(model, adamw, batches, loss_of, bridge)
        # Steps take turns one by one, as this machine's speed changes within a second.
        each = time_interleaved(runners, repeats=repeats * STEPS, warmup=4)
        for name, seconds in each.items():
            samples[name] += np.reshape(seconds, (repeats, STEPS)).mean(axis=1).tolist()
    shape = {"batch": 128, "steps": STEPS, "seeds": seeds, "rounds": rounds, "device": "cpu"}
    return {
        "cnn_bare": summarise(samples["bare"], "ms", **shape),
        "cnn_dormant": summarise(samples["dormant"], "ms", **shape),
        "cnn_dormant_overhead": ratio(
            samples["dormant"],
            samples["bare"],
            of_sums=sum(samples["dormant"]) / sum(samples["bare"]),
            **shape,
        ),
    }


def _cpu_rows(*, repeats: int, is_compiled: bool) -> dict[str, Row]:
    """A small decoder on the CPU, every chunk live, beside LoRA of as many parameters."""
    return _gpt_rows(
        "cpu",
        Gpt(layers=3, width=256, context=64, vocabulary=256),
        torch.randint(256, (4, 8, 65)),
        chunks=16,
        repeats=repeats,
        is_compiled=is_compiled,
        steps=4,
        lag=0,
    )


def _gpu_rows(*, repeats: int, is_compiled: bool) -> dict[str, Row]:
    """24 layers, 1,024 wide, 16 x 1,024 tokens, bfloat16, fused AdamW; 6,144 seeds of 16."""
    model = Gpt(layers=24, width=1024, context=1024, vocabulary=50_304)
    return _gpt_rows(
        "gpu",
        model.to("cuda", torch.bfloat16),
        torch.randint(50_304, (4, 16, 1025), device="cuda"),
        chunks=64,
        repeats=repeats,
        is_compiled=is_compiled,
        steps=STEPS,
        lag=1,
    )


def _gpt_rows(
    name: str,
    bare: Any,
    tokens: Any,
    *,
    chunks: int,
    repeats: int,
    is_compiled: bool,
    steps: int,
    lag: int,
) -> dict[str, Row]:
    rank = 16
    is_cuda = tokens.device.type == "cuda"
    rows: dict[str, Row] = {}
    has_peft = importlib.util.find_spec("peft") is not None

    def optimizer_of(params: Any) -> Any:
        return torch.optim.AdamW(params, 1e-5, fused=True)

    way = _ways(optimizer_of, list(tokens), lambda model, batch: model(batch), steps)
    for kind in ("eager", "compiled")[: 1 + is_compiled]:
        torch._dynamo.reset()
        compiles = kind == "compiled"
        runners = {"bare": way(copy.deepcopy(bare), None, compiles)}
        added = 0
        for of in ("dormant", "live"):
            model = copy.deepcopy(bare)
            bridge = grown(model, chunks, rank, is_live=of == "live", lag=lag)
            added = sum(p.numel() for p in bridge.adapter_parameters())
            runners[of] = way(model, bridge, compiles)
        lora = 0
        if has_peft:
            model, lora = adapted(bare, added)
            runners["peft"] = way(model, None, compiles)
        with analyse_kernels_once():
            samples = time_interleaved(runners, repeats=repeats, warmup=1)
        told = {
            "device": torch.cuda.get_device_name() if is_cuda else "cpu",
            "dtype": str(next(bare.parameters()).dtype).removeprefix("torch."),
            "seeds": bridge.layout.num_seeds,
            "added": added,
            "added_by_lora": lora,
            "rank": rank,
            "steps": steps,
            "lag": lag,
        }
        each = {of: [s / steps for s in seconds] for of, seconds in samples.items()}
        for of, seconds in each.items():
            rows[f"{name}_{kind}_{of}"] = summarise(seconds, "ms", **told)
        for of in ("dormant", "live"):
            over = f"{name}_{kind}_{of}_overhead"
            rows[over] = ratio(each[of], each["bare"], **told)
        if has_peft:
            rows[f"{name}_{kind}_live_over_peft"] = ratio(each["live"], each["peft"], **told)
            rows[f"{name}_{kind}_added_over_peft"] = exact(added / lora, "ratio")
        del runners, model, bridge
        if is_cuda:
            torch.cuda.empty_cache()
    return rows
