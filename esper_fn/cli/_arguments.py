"""Arguments of the commands that steer and watch. This module imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from importlib import import_module

from esper_fn._verbs import VERBS

ADDRESS_VARIABLE = "ESPER_BUS"
DEFAULT_ADDRESS = "redis://127.0.0.1:6379/0"
MAX_SECONDS = 1_000_000_000
SENT_VERBS = {name.replace("_", "-"): summary for name, summary in VERBS.items() if name != "stop"}
"""What `esper send` sends; to stop a run is a command of its own."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `send`, `watch`, `stop`, `dlq` and `bus-key`."""
    _add_send(commands)
    watch = commands.add_parser(
        "watch",
        help="show a running experiment live",
        description="Shows losses, stages, events and alerts of a run until it is interrupted.",
    )
    _add_address(watch)
    watch.add_argument(
        "--seconds", type=_seconds, default=math.inf, metavar="S", help="stop watching after S"
    )
    watch.add_argument(
        "--metrics-port",
        type=_port,
        metavar="N",
        help="also serve Prometheus metrics at http://127.0.0.1:N/metrics",
    )
    watch.set_defaults(run=_deferred("_watch", "watch"))

    stop = commands.add_parser("stop", help=VERBS["stop"].partition(",")[0])
    _add_address(stop)
    stop.add_argument("--reason", default="", metavar="TEXT", help="text for the run's record")
    stop.add_argument(
        "--wait",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="wait at most S seconds for the outcome (default: 30)",
    )
    stop.set_defaults(run=_deferred("_steer", "stop"))

    dlq = commands.add_parser(
        "dlq", help="list, show, replay or drop dead letters, the messages that were refused"
    )
    _add_address(dlq)
    dlq.add_argument(
        "action",
        choices=("list", "show", "replay", "drop"),
        metavar="ACTION",
        help="list all, show some, replay them as new commands, or drop them for good",
    )
    dlq.add_argument("letters", nargs="*", metavar="LETTER", help="ids, as `list` shows them")
    dlq.set_defaults(run=_deferred("_steer", "dlq"))

    key = commands.add_parser("bus-key", help="print a new key for $ESPER_BUS_KEYS")
    key.add_argument("--name", default="first", metavar="ID", help="id of the key (default: first)")
    key.set_defaults(run=_deferred("_steer", "key"))


def _add_send(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verbs = "\n".join(f"  {name:<12} {summary}" for name, summary in SENT_VERBS.items())
    send = commands.add_parser(
        "send",
        help="send a command to a running experiment",
        description="Sends one command to a run that was started with `esper grow --bus`.",
        epilog=f"commands:\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_address(send)
    send.add_argument(
        "verb", choices=SENT_VERBS, metavar="COMMAND", help="one of the commands listed below"
    )
    send.add_argument(
        "--site",
        metavar="NAME",
        help="site of the seed; without it, --seed counts the seeds of all sites",
    )
    send.add_argument("--seed", type=_whole, metavar="N", help="number of the seed")
    send.add_argument("--blueprint", metavar="NAME", help="blueprint to germinate")
    send.add_argument("--graft", metavar="NAME", help="alpha schedule, for germinate and set-graft")
    send.add_argument("--target", metavar="STAGE", help="stage to move to, for transition")
    send.add_argument("--file", metavar="PATH", help="JSON list of commands, for batch")
    send.add_argument(
        "--expires",
        type=_seconds,
        metavar="S",
        help="refuse the command if it is applied later than S seconds from now",
    )
    send.add_argument(
        "--id",
        metavar="ID",
        help="id of the command; a second command with this id gets the first one's outcome",
    )
    send.add_argument(
        "--wait",
        type=_seconds,
        nargs="?",
        const=30.0,
        metavar="S",
        help="wait at most S seconds (default: 30) for the outcome, and show it",
    )
    send.set_defaults(run=_deferred("_steer", "send"))


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bus",
        default=os.environ.get(ADDRESS_VARIABLE, DEFAULT_ADDRESS),
        metavar="ADDRESS",
        help=f"server of the bus: redis://HOST:PORT/DB or unix://PATH (default: "
        f"${ADDRESS_VARIABLE}, or {DEFAULT_ADDRESS})",
    )
    parser.add_argument(
        "--run",
        dest="run_name",
        metavar="NAME",
        help="run to connect to (default: the only active run)",
    )


def _deferred(module: str, name: str) -> Callable[..., int]:
    def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
        status: int = getattr(import_module(f"esper_fn.cli.{module}"), name)(parser, options)
        return status

    return run


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 100:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number, at least 0")
    return int(text)


def _port(text: str) -> int:
    value = _whole(text)
    if not 0 < value < 65_536:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no port, from 1 to 65535")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} is no number of seconds above 0, at most {MAX_SECONDS}"
        )
    return value
