"""The scene of adapting: a frozen character GPT, from one text to another."""

from __future__ import annotations

import copy
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import esper_fn as ef
import torch_bridge
from benchmarks._timing import Row, exact, summarise
from esper_fn.demo.data import load as load_data
from esper_fn.demo.jobs import mean_interval

RATES = (1e-3, 1e-2, 1e-1)
"""Learning rates, a factor of 10 apart."""
_RANK, _WIDTH, _BLOCKS, _CONTEXT, _BATCH, _HOST_STEPS = 4, 64, 2, 64, 32, 1000
_LINEAR = ("query", "key", "value", "out", "up", "down")


class _Block(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        for name in _LINEAR[:4]:
            self.add_module(name, nn.Linear(_WIDTH, _WIDTH))
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        query, key, value = (
            layer(h).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Gpt(nn.Module):  # type: ignore[misc]
    def __init__(self, num_characters: int) -> None:
        super().__init__()
        self.token = nn.Embedding(num_characters, _WIDTH)
        self.position = nn.Embedding(_CONTEXT, _WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, num_characters)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position.weight
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def _texts() -> tuple[list[np.ndarray], int, str]:
    """Source text, and training, validation and test text to adapt to, as character numbers."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    code = "".join(path.read_text(errors="ignore") for path in sorted(folder.glob("*.py")))
    code = "".join(letter for letter in code if ord(letter) < 127)[:2_000_000]
    try:
        source = load_data("shakespeare")
        letters = "".join(source.vocabulary or ())
        plain, name = "".join(letters[i] for i in source.train_inputs.reshape(-1)), source.name
    except ef.errors.MissingDataError:  # Python's own help pages, which every Python brings along
        from pydoc_data.topics import topics

        plain, name = "\n".join(topics.values()), "Python's help pages"
    numbers = {letter: i for i, letter in enumerate(sorted(set(plain + code)))}
    cuts = int(0.7 * len(code)), int(0.85 * len(code))
    parts = (plain, code[: cuts[0]], code[cuts[0] : cuts[1]], code[cuts[1] :])
    coded = [np.fromiter((numbers[c] for c in part), np.int64, len(part)) for part in parts]
    return coded, len(numbers), name


def _loss(model: nn.Module, text: np.ndarray, random: np.random.Generator) -> Tensor:
    starts = random.integers(0, len(text) - _CONTEXT - 1, _BATCH)
    rows = torch.from_numpy(np.stack([text[i : i + _CONTEXT + 1] for i in starts]))
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def _score(model: nn.Module, text: np.ndarray) -> float:
    random = np.random.default_rng(0)
    with torch.no_grad():
        return float(np.mean([float(_loss(model, text, random)) for _ in range(8)]))


def _train(
    model: nn.Module, params: Any, text: np.ndarray, rate: float, steps: int, seed: int
) -> Any:
    """Yields the loss of each step after the optimiser's."""
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=0.0)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        loss = _loss(model, text, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss


def _lora(host: nn.Module, rate: float, steps: int, seed: int, texts: Any) -> tuple[Any, int]:
    config = peft.LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=list(_LINEAR))
    model = peft.inject_adapter_in_model(config, copy.deepcopy(host))
    params = [p for p in model.parameters() if p.requires_grad]
    for _ in _train(model, params, texts[1], rate, steps, seed):
        pass
    return model, sum(p.numel() for p in params)


def _grown(host: nn.Module, rate: float, steps: int, seed: int, texts: Any) -> tuple[Any, int]:
    model = copy.deepcopy(host)
    bridge = torch_bridge.grow(
        model,
        targets=list(_LINEAR),
        chunks=1,
        capacity=1,
        blueprints={"low_rank": ef.blueprints.low_rank(rank=_RANK)},
        seed=seed,
        verbose=False,
    )
    params = bridge.adapter_parameters()
    for loss in _train(model, params, texts[1], rate, steps, seed):
        bridge.step(loss)
    return model, sum(p.numel() for p in params)


def rows(*, num_seeds: int, steps: int) -> dict[str, Row]:
    """Ours minus LoRA's at the rates that validation chose, and the worst of ours over frozen."""
    texts, num_characters, name = _texts()
    finals: dict[str, list[float]] = {"grown": [], "lora": []}
    same_rate: list[float] = []
    over_frozen, chosen, sizes = [], [], {}
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        host = _Gpt(num_characters)
        for _ in _train(
            host, host.parameters(), texts[0], 2e-3, min(_HOST_STEPS, 25 * steps), seed
        ):
            pass
        host.requires_grad_(False)
        frozen = _score(host, texts[3])
        validated: dict[str, dict[float, tuple[float, float]]] = {"grown": {}, "lora": {}}
        for arm, adapt in (("grown", _grown), ("lora", _lora)):
            for rate in RATES:
                model, sizes[arm] = adapt(host, rate, steps, 1000 + seed, texts)
                validated[arm][rate] = _score(model, texts[2]), _score(model, texts[3])
                if arm == "grown":
                    over_frozen.append(validated[arm][rate][1] - frozen)
        best = {
            arm: min((on[0], rate) for rate, on in of.items())[1] for arm, of in validated.items()
        }
        chosen.append(best)
        for arm, rate in best.items():
            finals[arm].append(validated[arm][rate][1])
        same_rate.append(validated["grown"][best["lora"]][1])
    told = {"source": name, "steps": steps, "parameters": sizes, "rates": RATES, "chosen": chosen}
    found = mean_interval(np.subtract(same_rate, finals["lora"]))
    return {
        "adapt_grown_minus_lora": Row(
            median=found["mean"],
            low=found["low"],
            high=found["high"],
            unit="nats",
            count=num_seeds,
            extra={
                "statistic": "mean and 95 % t-interval, both at LoRA's best rate",
                "grown": same_rate,
                "grown_at_its_best": finals["grown"],
                "lora": finals["lora"],
                **told,
            },
        ),
        "adapt_worst_over_frozen": exact(max(over_frozen), "nats", **told),
        "adapt_over_frozen": summarise(over_frozen, "nats", **told),
    }
