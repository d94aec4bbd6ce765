"""Runs the `esper` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from esper_fn._version import __version__
from esper_fn.cli import _arguments
from esper_fn.cli._say import Parser, complain, safe_streams, say
from esper_fn.errors import EsperError

USAGE_ERROR = 2
FAILURE = 1
MAX_COUNT = 2**53
MAX_STEPS = 10**8
MAX_SEED = 2**32 - 1
"""Larger ones would be cut to 32 bits by JAX, and two of them be one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status.

    0 for success, 2 for a wrong call, 1 for a run that failed. Errors of Esper-fn are printed as
    one line, and so are those of the file system; anything else is a bug and keeps its traceback.
    """
    with safe_streams():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser: argparse.ArgumentParser = Parser(
        prog="esper", description="Grow neural networks while they train."
    )
    parser.add_argument("--version", action="version", version=f"esper-fn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_grow(commands)
    _add_report(commands)
    _add_checkpoint(commands)
    _add_export(commands)
    _arguments.add(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_unknown(options, unknown)
    try:
        status: int = options.run(options.parser, options)
    except BrokenPipeError:
        return FAILURE
    except KeyboardInterrupt:
        complain("interrupted; the run folder holds what was measured so far")
        return 130
    except (EsperError, ModuleNotFoundError, OSError) as error:
        complain(error)
        return FAILURE
    except MemoryError as error:
        complain(f"not enough memory for this: {error}; ask for fewer steps or less data")
        return FAILURE
    except Exception as error:
        if not _is_of_server(error):
            raise
        complain(f"the bus's server refuses this: {error}")
        return FAILURE
    return status


def _is_of_server(error: Exception) -> bool:
    redis = sys.modules.get("redis")
    return redis is not None and isinstance(error, redis.RedisError)


def _refuse_unknown(options: argparse.Namespace, unknown: list[str]) -> NoReturn:
    hint = ""
    if options.command == "watch" and not unknown[0].startswith("-"):
        hint = (
            "; it follows a living run over its bus: esper watch --bus ADDRESS --run NAME. For the "
            "folder of a finished run: esper report DIR"
        )
    elif options.command in {"send", "stop", "dlq"} and not unknown[0].startswith("-"):
        hint = "; a run is named with --run NAME, its bus with --bus ADDRESS"
    parser: argparse.ArgumentParser = options.parser
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _count(least: int, most: int = MAX_COUNT) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large; at most {most}")
        return value

    return parse


def _add_grow(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    grow = commands.add_parser(
        "grow",
        help="grow a network on a data set and compare it with its rivals",
        description="Grows a network and trains, with the same data and steps, the host without "
        "growth, growth at every layer alike and at random sites, and a static network of equal "
        "size.",
    )
    # Names are checked later against the jobs and policies, which cost an import of JAX.
    add = grow.add_argument
    add("--data", default="digits", metavar="NAME", help="train on this data set: digits "
        "(default), fashion-mnist, mnist1d or shakespeare")  # fmt: skip
    add("--data-folder", metavar="DIR", help="read the data from this folder (default: "
        "$ESPER_DATA, then the user's cache)")  # fmt: skip
    add("--steps", type=_count(40, MAX_STEPS), metavar="N", help="train each arm for N steps "
        "(default: depends on the data set)")  # fmt: skip
    add("--seed", type=_count(0, MAX_SEED), default=0, metavar="N", help="use this random seed "
        f"for weights and data order (default: 0, at most {MAX_SEED})")  # fmt: skip
    add("--repeat", type=_count(1), default=1, metavar="N", help="run N times, with the seeds "
        "from --seed on, and report intervals")  # fmt: skip
    add("--policy", default="grow", metavar="NAME", help="let this policy decide when to grow: "
        "grow (default), periodic, plateau, random or never (none means never)")  # fmt: skip
    add("--out", metavar="DIR", help="write the run to this folder (default: runs/DATA-SEED)")
    add("--resume", choices=("auto", "never"), default="never", help="auto: go on with the "
        "stopped run in --out, if there is one (default: never)")  # fmt: skip
    add("--save-every", type=_count(1), default=500, metavar="N", help="write a checkpoint every "
        "N steps (default: 500)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier run in --out")
    add("--json", action="store_true", help="print the summary as JSON on stdout")
    add("--bus", metavar="ADDRESS", help="let others watch and steer the growing arm of the first "
        "run through this bus: redis://HOST:PORT/DB, unix://PATH or memory")  # fmt: skip
    add("--run", dest="run_name", metavar="NAME", help="call the run NAME on the bus (default: "
        "DATA-SEED)")  # fmt: skip
    grow.set_defaults(run=_run_grow)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser("report", help="write report.html of a finished run again")
    report.add_argument("folder", metavar="DIR", help="read the run from this folder")
    report.set_defaults(run=_run_report)


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoint = commands.add_parser(
        "checkpoint", help="list, verify or prune the checkpoints below a folder"
    )
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help_ in (
        ("list", "list the saved steps"),
        ("verify", "read every byte and name the first bad file of each step"),
        ("prune", "remove the steps that no option keeps; the newest sound one always stays"),
    ):
        action = actions.add_parser(name, help=help_)
        action.add_argument("folder", metavar="DIR", help="search this checkpoint or run folder")
        action.add_argument("--key-file", metavar="FILE", help="check manifests with the key in "
            "this file, with which they were sealed")  # fmt: skip
        action.set_defaults(run=_run_checkpoint, parser=action)
        if name == "prune":
            _add_prune_options(action)


def _add_prune_options(prune: argparse.ArgumentParser) -> None:
    add = prune.add_argument
    add("--latest", type=_count(1), metavar="N", help="keep the newest N steps")
    add("--every", type=_count(1), metavar="K", help="keep the steps that K divides")
    add("--best", metavar="[N:]METRIC", help="keep the N steps with the lowest METRIC, as 2:loss")
    add("--pin", type=_count(0), nargs="+", default=[], metavar="STEP", help="keep these steps")
    add("--within-bytes", type=_count(1), metavar="N", help="keep of these what fits N bytes")
    add("--dry-run", action="store_true", help="say what would be removed and why; remove nothing")


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser("export", help="write a run's grown network for other programs")
    add = export.add_argument
    add("folder", metavar="RUN", help="read the run from this folder of `esper grow`")
    add("--format", choices=("safetensors", "stablehlo"), default="safetensors",
        help="write this format (default: safetensors)")  # fmt: skip
    add("--arm", choices=("grown", "uniform", "random"), default="grown",
        help="export the network of this arm (default: grown)")  # fmt: skip
    add("--seed", type=_count(0), metavar="N",
        help="export the run with this seed (default: the lowest)")  # fmt: skip
    add("--data-folder", metavar="DIR", help="read the data from this folder (default: "
        "$ESPER_DATA, then the user's cache)")  # fmt: skip
    add("--out", metavar="DIR", help="write to this folder (default: RUN/export)")
    export.set_defaults(run=_run_export)


def _run_checkpoint(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from esper_fn.cli import _checkpoint

    return _checkpoint.run(parser, options)


def _run_export(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from esper_fn.cli import _checkpoint

    return _checkpoint.export(parser, options)


def _run_grow(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from esper_fn.cli import _grow

    return _grow.run(parser, options)


def _run_report(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    del parser
    from esper_fn import report

    say(report.write_report(options.folder))
    return 0
