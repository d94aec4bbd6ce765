"""Runs `esper checkpoint` and `esper export`."""

from __future__ import annotations

import argparse
from functools import reduce
from operator import or_
from pathlib import Path

from esper_fn import checkpoint
from esper_fn.checkpoint._folder import inspect
from esper_fn.cli._say import say
from esper_fn.demo import jobs
from esper_fn.errors import CheckpointError, NoCheckpointError

_MAX_KEY_BYTES = 2**20


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Runs an action on every checkpoint folder at or below the given one."""
    key = None if options.key_file is None else _read_key(options.key_file)
    keep = _retention(parser, options) if options.action == "prune" else None
    folders = _folders(Path(options.folder))
    status = 0
    for folder in folders:
        label = "" if len(folders) == 1 else f"{folder}: "
        if options.action == "list":
            _list(folder, label, key)
        elif options.action == "verify":
            status = max(status, _verify(folder, label, key))
        else:
            assert keep is not None  # noqa: S101 -- made above for this action
            for decision in checkpoint.prune(folder, keep, dry_run=options.dry_run, key=key):
                removed = "to be removed" if options.dry_run else "removed"
                fate = "kept" if decision.is_kept else removed
                say(f"{label}step {decision.step}: {fate}: {decision.why}")
    return status


def _read_key(name: str) -> bytes:
    with open(name, "rb") as file:
        key = file.read(_MAX_KEY_BYTES + 1)
    if not 16 <= len(key) <= _MAX_KEY_BYTES:
        raise CheckpointError(
            f"--key-file {name}: a key has 16 to {_MAX_KEY_BYTES} bytes; name the file that the "
            "run's key was read from"
        )
    return key


def _folders(folder: Path) -> list[Path]:
    folders = [folder] if (folder / "run.json").is_file() else []
    for pattern in ("*/*/*/run.json", "*/*/run.json"):
        folders += sorted(path.parent for path in folder.glob(pattern))
    if not folders:
        raise NoCheckpointError(
            f"{folder}: it holds no checkpoints; name a checkpoint or run folder"
        )
    return folders


def _list(folder: Path, label: str, key: bytes | None) -> None:
    for step in checkpoint.steps(folder):
        try:
            manifest = inspect(folder, step, key=key)
        except CheckpointError as error:
            say(f"{label}step {step}: {error}")
            continue
        size = sum(file.num_bytes for file in manifest.files.values())
        metrics = "".join(f", {name} {value:.6g}" for name, value in manifest.metrics.items())
        say(f"{label}step {step}: {len(manifest.leaves)} leaves, {size:,} bytes{metrics}")


def _verify(folder: Path, label: str, key: bytes | None) -> int:
    status = 0
    for step, damage in checkpoint.verify(folder, key=key).items():
        if damage is None:
            say(f"{label}step {step}: sound")
        else:
            say(f"{label}{damage}", to_stderr=True)
            status = 1
    return status


def _retention(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> checkpoint.Retention:
    rules = []
    if options.latest is not None:
        rules.append(checkpoint.latest(options.latest))
    if options.every is not None:
        rules.append(checkpoint.every(options.every))
    if options.best is not None:
        count, colon, metric = options.best.partition(":")
        if not colon:
            count, metric = "1", options.best
        if not count.isdecimal() or int(count) < 1 or not metric:
            parser.error(f"argument --best: {options.best!r} is not [N:]METRIC, as 2:loss")
        rules.append(checkpoint.best(int(count), metric))
    if options.pin:
        rules.append(checkpoint.pinned(options.pin))
    if not rules and options.within_bytes is None:
        parser.error("prune needs at least one of --latest, --every, --best, --pin, --within-bytes")
    keep = reduce(or_, rules) if rules else checkpoint.everything()
    if options.within_bytes is not None:
        keep = keep & checkpoint.within_bytes(options.within_bytes)
    return keep


def export(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Runs `esper export`: writes the network, reads it back and tests it."""
    del parser
    run = Path(options.folder)
    result = jobs.export_run(
        run,
        Path(options.out) if options.out else run / "export",
        format=options.format,
        arm=options.arm,
        seed=options.seed,
        data_folder=options.data_folder,
    )
    say(
        f"step {result['step']}: {result['adapters']} adapters beside the host, {result['folded']} "
        f"folded into it; test accuracy {result['exported_test_accuracy']:.2%} as written, "
        f"{result['test_accuracy']:.2%} in the run"
    )
    for file in result["files"]:
        say(file)
    return 0
