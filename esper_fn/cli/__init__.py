"""The `esper` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from esper_fn._version import __version__
from esper_fn.cli import _arguments
from esper_fn.errors import EsperError

USAGE_ERROR = 2
FAILURE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status.

    0 for success, 2 for a wrong call, 1 for a run that failed. Errors of Esper-fn are printed as
    one line, and so are those of the file system; anything else is a bug and keeps its traceback.
    """
    parser = argparse.ArgumentParser(
        prog="esper", description="Grow neural networks while they train."
    )
    parser.add_argument("--version", action="version", version=f"esper-fn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_grow(commands)
    _add_report(commands)
    _add_checkpoint(commands)
    _add_export(commands)
    _arguments.add(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(parser, options)
    except BrokenPipeError:
        return FAILURE
    except KeyboardInterrupt:
        print("interrupted; the run folder holds what was measured so far", file=sys.stderr)
        return 130
    except (EsperError, ModuleNotFoundError, OSError) as error:
        print(f"esper: {error}", file=sys.stderr)
        return FAILURE
    return status


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; at least {least}")
        return value

    return parse


def _add_grow(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    grow = commands.add_parser(
        "grow",
        help="grow a network on a data set and compare it with its rivals",
        description="Grows a network and trains, with the same data and steps, the host without "
        "growth, growth at every layer alike and at random places, and a static network of equal "
        "size.",
    )
    # Names are checked against the registries below, which cost an import of JAX.
    grow.add_argument(
        "--data",
        default="digits",
        metavar="NAME",
        help="digits (default), fashion-mnist, mnist1d or shakespeare",
    )
    grow.add_argument("--data-folder", metavar="DIR", help="where its files lie ($ESPER_DATA)")
    grow.add_argument("--steps", type=_count(40), metavar="N", help="training steps of each arm")
    grow.add_argument("--seed", type=_count(0), default=0, metavar="N", help="of weights and order")
    grow.add_argument(
        "--repeat",
        type=_count(1),
        default=1,
        metavar="N",
        help="runs, with seeds from --seed on",
    )
    grow.add_argument(
        "--policy",
        default="grow",
        metavar="NAME",
        help="who asks for growth: grow (default), periodic, plateau, random or never",
    )
    grow.add_argument("--out", metavar="DIR", help="run folder (runs/DATA-SEED)")
    grow.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: go on with the stopped run in --out, if there is one",
    )
    grow.add_argument(
        "--save-every", type=_count(1), default=500, metavar="N", help="steps between checkpoints"
    )
    grow.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    grow.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    grow.add_argument(
        "--bus",
        metavar="ADDRESS",
        help="let the growing arm of the first run be steered and watched: redis://HOST:PORT/DB, "
        "unix://PATH or memory",
    )
    grow.add_argument("--run", dest="run_name", metavar="NAME", help="on the bus (DATA-SEED)")
    grow.set_defaults(run=_run_grow)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser("report", help="write report.html of a finished run anew")
    report.add_argument("folder", metavar="DIR", help="a run folder")
    report.set_defaults(run=_run_report)


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoint = commands.add_parser(
        "checkpoint", help="list, verify or prune the checkpoints below a folder"
    )
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, told in (
        ("list", "the steps there are"),
        ("verify", "read every byte; name the first bad file of each step"),
        ("prune", "remove the steps that no option keeps; the newest sound one always stays"),
    ):
        action = actions.add_parser(name, help=told)
        action.add_argument("folder", metavar="DIR", help="a checkpoint or run folder")
        action.add_argument(
            "--key-file", metavar="FILE", help="the key that manifests were sealed with"
        )
        action.set_defaults(run=_run_checkpoint)
        if name == "prune":
            action.add_argument("--latest", type=_count(1), metavar="N", help="keep the newest N")
            action.add_argument("--every", type=_count(1), metavar="K", help="keep multiples of K")
            action.add_argument(
                "--best", metavar="[N:]METRIC", help="keep the N with the lowest METRIC, as 2:loss"
            )
            action.add_argument(
                "--pin", type=_count(0), nargs="+", default=[], metavar="STEP", help="keep these"
            )
            action.add_argument(
                "--within-bytes", type=_count(1), metavar="N", help="of these, what fits N bytes"
            )
            action.add_argument(
                "--dry-run", action="store_true", help="say what would go and why; remove nothing"
            )


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser("export", help="write a run's grown network for other programs")
    export.add_argument("folder", metavar="RUN", help="a folder of `esper grow`")
    export.add_argument("--format", choices=("safetensors", "stablehlo"), default="safetensors")
    export.add_argument("--arm", choices=("grown", "uniform", "random"), default="grown")
    export.add_argument("--seed", type=_count(0), metavar="N", help="of which run; the lowest")
    export.add_argument("--data-folder", metavar="DIR", help="where its data lie ($ESPER_DATA)")
    export.add_argument("--out", metavar="DIR", help="where to write (RUN/export)")
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

    print(report.write_report(options.folder))
    return 0
