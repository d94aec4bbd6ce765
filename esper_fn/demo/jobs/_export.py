"""Writes the grown network of a finished or stopped run for others, and checks it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esper_fn import checkpoint, export
from esper_fn._growth import Growth
from esper_fn._layout import Layout
from esper_fn._typing import Params
from esper_fn.demo import data
from esper_fn.demo.hosts import Host
from esper_fn.demo.jobs._evaluate import make_evaluate
from esper_fn.demo.jobs._jobs import get, make_growth
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
    """Writes the network of a run folder and `lineage.json`, then tests what was written.

    Args:
      run: a folder of `esper grow`.
      out: the folder to write to.
      format: `safetensors` or `stablehlo`.
      arm: `grown`, `uniform` or `random`.
      seed: of the run; the lowest of the folder by default.
      data_folder: folder of the data set; see `data.load`.

    Returns:
      `files`, `test_accuracy` of the run's own state and `exported_test_accuracy` of the files
      read back, the numbers of `adapters` and of `folded` ones, and the `step`.

    Raises:
      CheckpointError: the folder has no checkpoint of this arm.
      CorruptCheckpointError: what was written does not predict what the run's state predicts.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {FORMATS}, got {format!r}")
    folder = _folder(run, arm, seed)
    restored = checkpoint.restore(folder)
    settings = _settings(folder, restored)
    dataset, host, growth = _rebuild(settings, data_folder)
    state = restored.value["state"]
    accuracy = _accuracy(host, state.params, growth.seeds(state.growth_state), dataset)
    adapters = export.acting_adapters(growth, state.growth_state)
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
    write = _write_safetensors if format == "safetensors" else _write_stablehlo
    out.mkdir(parents=True, exist_ok=True)
    files, written = write(out, _Network(host, growth.layout, params, rest), note, dataset)
    _check_accuracy(out, written, accuracy, len(dataset.test_inputs))
    files.append(_write_lineage(out, restored.record["record"], rest, folded, note))
    return {
        "files": [str(file) for file in files],
        "test_accuracy": accuracy,
        "exported_test_accuracy": written,
        "adapters": len(rest),
        "folded": len(folded),
        "step": restored.step,
    }


def _check_accuracy(out: Path, written: float, accuracy: float, num_examples: int) -> None:
    # One example in a thousand may lie on the border that rounding moves.
    if abs(written - accuracy) > 1e-3 + 1.0 / num_examples:
        raise CorruptCheckpointError(
            f"{out}: the network written has test accuracy {written:.4f}, the run's {accuracy:.4f}"
        )


class _Network(NamedTuple):
    host: Host
    layout: Layout
    params: Params
    adapters: Sequence[export.Adapter]


def _accuracy(host: Host, params: Params, seeds: Any, dataset: data.Dataset) -> float:
    evaluate = make_evaluate(host, dataset.test_inputs, dataset.test_targets)
    return evaluate(params, seeds)[0]


def _write_safetensors(
    out: Path, network: _Network, note: dict[str, Any], dataset: data.Dataset
) -> tuple[list[Path], float]:
    """Writes a network, and returns the files and the test accuracy of what they hold."""
    file = out / "network.safetensors"
    export.write_safetensors(file, network.params, network.adapters, note)
    written = export.read_safetensors(file)
    seeds = export.fixed_seeds(network.layout, written.adapters)
    return [file], _accuracy(network.host, written.params, seeds, dataset)


def _write_stablehlo(
    out: Path, network: _Network, note: dict[str, Any], dataset: data.Dataset
) -> tuple[list[Path], float]:
    """Writes a network, and returns the files and the test accuracy of what they hold."""
    del note  # lineage.json has it
    seeds: Any = export.fixed_seeds(network.layout, network.adapters)
    apply = partial(network.host.apply, network.params, seeds)
    files = export.write_stablehlo(out, apply, dataset.test_inputs)
    logits = np.asarray(export.read_stablehlo(out)(dataset.test_inputs))
    return files, float(np.mean(np.argmax(logits, -1) == dataset.test_targets))


def _write_lineage(
    out: Path,
    record: Any,
    adapters: Sequence[export.Adapter],
    folded: Sequence[export.Adapter],
    note: dict[str, Any],
) -> Path:
    record = _plain(record)
    lineage = export.lineage(
        record["events"], record["rollbacks"], adapters=adapters, folded=folded, note=note
    )
    file = out / "lineage.json"
    file.write_text(json.dumps(lineage, indent=1, allow_nan=False) + "\n")
    return file


def _rebuild(
    settings: dict[str, Any], data_folder: str | None
) -> tuple[data.Dataset, Host, Growth]:
    """Makes the data set, the host and the growing network of a run anew."""
    dataset = data.load(settings["data"], folder=data_folder)
    job = get(settings["data"])
    host = job.host(dataset)
    return dataset, host, make_growth(job, host, settings["policy"], steps=settings["steps"])


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
    """Returns what `fit` recorded, with None for numbers that are not finite."""
    if isinstance(value, dict):
        if value.keys() == {"$float"}:
            return None
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _folder(run: Path, arm: str, seed: int | None) -> Path:
    folders = {
        int(number): path
        for path in (run / "checkpoints").glob(f"seed-*/{arm}")
        if (number := path.parent.name.removeprefix("seed-")).isdecimal()
    }
    if not folders:
        raise CheckpointError(
            f"{run}: no checkpoint of the arm {arm!r}; name a folder of `esper grow`"
        )
    seed = min(folders) if seed is None else seed
    if seed not in folders:
        raise CheckpointError(f"{run}: no seed {seed}; there are {sorted(folders)}")
    return folders[seed]
