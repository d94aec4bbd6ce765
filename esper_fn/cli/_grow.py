"""Runs `esper grow`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from esper_fn import report, runtime
from esper_fn.checkpoint._folder import exclusive
from esper_fn.cli import MAX_SEED
from esper_fn.cli._say import complain
from esper_fn.cli._show import Screen
from esper_fn.demo import data, jobs
from esper_fn.errors import RunFolderError

CHECKPOINTS = "checkpoints"
"""Folder of a run in which its checkpoints lie."""


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Runs the five arms once or several times and writes the run folder."""
    if options.policy == "none":
        options.policy = "never"
    _check(parser, options)
    # Everything that can be refused is refused before a folder is made.
    dataset = data.load(options.data, folder=options.data_folder)
    job = jobs.get(options.data)
    target = Path(options.out or f"runs/{options.data}-{options.seed}")
    steering: runtime.Steering | None = None

    def report_failure(error: BaseException) -> None:
        complain(f"a checkpoint was not written: {error}")
        if steering is not None:
            steering.checkpoint_failed(error)

    with runtime.termination() as should_stop:
        checkpoints = jobs.ArmCheckpoints(
            folder=target / CHECKPOINTS,
            every_steps=options.save_every,
            settings={
                "data": options.data,
                "steps": options.steps or job.steps,
                "policy": options.policy,
            },
            should_stop=should_stop,
            on_failure=report_failure,
        )
        comparison = jobs.prepare(
            job, dataset, steps=options.steps, policy=options.policy, checkpoints=checkpoints
        )
        if options.bus is not None:
            from esper_fn.cli import _steer

            steering = comparison.steering = _steer.prepare(options, comparison.growth)
        try:
            return _run(options, comparison, target)
        except jobs.StoppedError as stop:
            complain(f"{stop}; `--resume auto` with the same options goes on")
            return 0 if stop.is_saved else 1


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.seed + options.repeat - 1 > MAX_SEED:
        parser.error(
            f"argument --repeat: the last seed would be {options.seed + options.repeat - 1}, at "
            f"most {MAX_SEED}; lower --seed or --repeat"
        )
    for option, name, allowed in (
        ("--data", options.data, jobs.names()),
        ("--policy", options.policy, jobs.POLICIES),
    ):
        if name not in allowed:
            parser.error(f"argument {option}: unknown {name!r}; allowed: {', '.join(allowed)}")


def _run(options: argparse.Namespace, comparison: jobs.Comparison, target: Path) -> int:
    with _open(target, options.overwrite, is_resumed=options.resume == "auto") as folder:
        screen = Screen(comparison, num_repeats=options.repeat, is_quiet=options.json)

        def record(progress: jobs.Progress) -> None:
            screen.show(progress)
            for event in progress.events:
                folder.append_event(event)
            folder.append_metrics(_metrics(progress))

        rows = []
        for repeat in range(options.repeat):
            # The folder and the screen follow the first run; the others are rows of the summary.
            listener = record if repeat == 0 else None
            rows.append(jobs.run(comparison, options.seed + repeat, listener, screen.announce))
            screen.finish(rows[-1])
        summary = jobs.summarize(comparison, rows)
        folder.finish(summary)
    page = report.write_report(target)
    if options.json:
        json.dump({**summary, "folder": str(target)}, sys.stdout, indent=2)
        print()
    else:
        screen.summarize(summary, page)
    return 0


def _open(target: Path, overwrite: bool, *, is_resumed: bool) -> report.RunFolder:
    """Opens the run folder; a resumed run writes anew what its checkpoints hold."""
    try:
        if is_resumed:
            return report.create(target, overwrite=True)
        # Both locks come first: a run that lives keeps its folder and its checkpoints.
        with exclusive(target / CHECKPOINTS):
            folder = report.create(target, overwrite=overwrite)
            shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)
            return folder
    except RunFolderError as error:
        raise RunFolderError(str(error).replace("overwrite=True", "--overwrite")) from None


def _metrics(progress: jobs.Progress) -> dict[str, Any]:
    row = progress._asdict()
    del row["events"]
    return {name: value for name, value in row.items() if value is not None or name == "loss"}
