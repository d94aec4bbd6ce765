"""A finished or stopped run's grown network, written for others and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from esper_fn import checkpoint, export
from esper_fn.demo import data
from esper_fn.demo.jobs._compare import evaluator
from esper_fn.demo.jobs._jobs import job, make_growth
from esper_fn.errors import CheckpointError, CorruptCheckpointError

FORMATS = ("safetensors", "stablehlo")


def export_run(
    run: Path,
    out: Path,
    *,
    format: str = "safetensors",  # noqa: A002 -- as the command calls it
    arm: str = "grown",
    seed: int | None = None,
    data_folder: str | None = None,
) -> dict[str, Any]:
    """Writes the network of a run folder, and `lineage.json`, then tests what was written.

    Args:
      run: a folder of `esper grow`.
      out: the folder to write to.
      format: `safetensors` or `stablehlo`.
      arm: `grown`, `uniform` or `random`.
      seed: of which run; the lowest there is when left out.
      data_folder: where the data set lies.

    Returns:
      Files, accuracy of the run's own state and of the files read back, adapters and folded ones.

    Raises:
      CheckpointError: no checkpoint of such an arm.
      CorruptCheckpointError: what was written does not predict what the run's state predicts.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {FORMATS}, got {format!r}")
    folder = _folder(run, arm, seed)
    restored = checkpoint.restore(folder)
    settings = _settings(folder, restored)
    dataset = data.load(settings["data"], folder=data_folder)
    chosen = job(settings["data"])
    host = chosen.host(dataset)
    growth = make_growth(chosen, host, settings["policy"], steps=settings["steps"])
    state = restored.value["state"]
    evaluate = evaluator(host, dataset.test_inputs, dataset.test_targets)
    accuracy = float(evaluate(state.params, growth.seeds(state.growth))[0])
    adapters = export.acting(growth, state.growth)
    params, rest, folded = export.fold(host.fold, growth.layout, state.params, adapters)
    note = {
        "data": settings["data"],
        "host": host.name,
        "arm": arm,
        "seed": settings["seed"],
        "step": restored.step,
        "test_accuracy": accuracy,
        "folded_seeds": [adapter.seed for adapter in folded],
    }
    out.mkdir(parents=True, exist_ok=True)
    seeds: Any
    if format == "safetensors":
        files = [out / "network.safetensors"]
        export.write_safetensors(files[0], params, rest, note)
        network = export.read_safetensors(files[0])
        seeds = export.fixed(growth.layout, network.adapters)
        written = float(evaluate(network.params, seeds)[0])
    else:
        seeds = export.fixed(growth.layout, rest)
        files = export.write_stablehlo(
            out, lambda inputs: host.apply(params, seeds, inputs), dataset.test_inputs
        )
        logits = export.read_stablehlo(out)(dataset.test_inputs)
        written = float(np.mean(np.argmax(np.asarray(logits), -1) == dataset.test_targets))
    record = _plain(restored.record["record"])
    told = export.lineage(
        record["events"], record["rollbacks"], adapters=rest, folded=folded, note=note
    )
    files.append(out / "lineage.json")
    files[-1].write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")
    # One example in a thousand may lie on the border that rounding moves.
    if abs(written - accuracy) > 1e-3 + 1.0 / len(dataset.test_inputs):
        raise CorruptCheckpointError(
            f"{out}: the network written has test accuracy {written:.4f}, the run's {accuracy:.4f}"
        )
    return {
        "files": [str(file) for file in files],
        "test_accuracy": accuracy,
        "exported_test_accuracy": written,
        "adapters": len(rest),
        "folded": len(folded),
        "step": restored.step,
    }


def _settings(folder: Path, restored: checkpoint.Restored) -> dict[str, Any]:
    record = restored.record if isinstance(restored.record, dict) else {}
    settings = record.get("settings")
    kinds = {"data": str, "policy": str, "steps": int, "seed": int}
    is_ours = isinstance(settings, dict) and all(
        type(settings.get(name)) is kind for name, kind in kinds.items()
    )
    value = restored.value
    if not (is_ours and "record" in record and isinstance(value, dict) and "state" in value):
        raise CheckpointError(
            f"{folder}: step {restored.step} was not saved by `esper grow`; name a folder of it"
        )
    return dict(settings)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """What `fit` recorded, with null for numbers that are not finite."""
    if isinstance(value, dict):
        if value.keys() == {"$float"}:
            return None
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _folder(run: Path, arm: str, seed: int | None) -> Path:
    found = sorted(
        (int(path.parent.name.removeprefix("seed-")), path)
        for path in (run / "checkpoints").glob(f"seed-*/{arm}")
        if path.parent.name.removeprefix("seed-").isdecimal()
    )
    if not found:
        raise CheckpointError(
            f"{run}: no checkpoint of the arm {arm!r}; name a folder of `esper grow`"
        )
    for number, path in found:
        if seed in (None, number):
            return path
    raise CheckpointError(f"{run}: no seed {seed}; there are {[number for number, _ in found]}")
