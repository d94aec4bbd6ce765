"""`esper grow`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from esper_fn import data, report
from esper_fn import experiments as ex
from esper_fn.cli._show import Screen
from esper_fn.errors import RunFolderError


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Runs the four arms once or several times and writes the run folder."""
    for kind, name, allowed in (
        ("--data", options.data, ex.names()),
        ("--policy", options.policy, ex.POLICIES),
    ):
        if name not in allowed:
            parser.error(f"argument {kind}: unknown {name!r}; allowed: {', '.join(allowed)}")
    # All that can be refused is refused before a folder is made.
    dataset = data.load(options.data, folder=options.data_folder)
    comparison = ex.prepare(
        ex.job(options.data), dataset, steps=options.steps, policy=options.policy
    )
    target = Path(options.out or f"runs/{options.data}-{options.seed}")
    with _open(target, options.overwrite) as folder:
        screen = Screen(comparison, num_repeats=options.repeat, is_quiet=options.json)
        rows = []
        for repeat in range(options.repeat):
            is_first = repeat == 0

            def listen(progress: ex.Progress, is_first: bool = is_first) -> None:
                screen.show(progress, is_first=is_first)
                if not is_first:
                    return
                for event in progress.events:
                    folder.append_event(event)
                folder.append_metrics(_metrics(progress))

            row = ex.run(comparison, options.seed + repeat, listen, screen.announce)
            screen.finish(row)
            rows.append(row)
        summary = ex.summary(comparison, rows)
        folder.finish(summary)
    page = report.write_report(target)
    if options.json:
        json.dump({**summary, "folder": str(target)}, sys.stdout, indent=2)
        print()
    else:
        screen.summarise(summary, page)
    return 0


def _open(target: Path, overwrite: bool) -> report.RunFolder:
    try:
        return report.create(target, overwrite=overwrite)
    except RunFolderError as error:
        raise RunFolderError(str(error).replace("overwrite=True", "--overwrite")) from None


def _metrics(progress: ex.Progress) -> dict[str, Any]:
    row = progress._asdict()
    del row["events"]
    return {name: value for name, value in row.items() if value is not None or name == "loss"}
