"""Arguments of the commands that steer and watch; nothing heavy is imported here."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from importlib import import_module

ADDRESS_VARIABLE = "ESPER_BUS"
DEFAULT_ADDRESS = "redis://127.0.0.1:6379/0"
MAX_SECONDS = 1_000_000_000
KINDS = (
    "germinate",
    "transition",
    "set-graft",
    "cull",
    "cancel",
    "roll-back",
    "release",
    "hold",
    "let-go",
    "pause",
    "resume",
    "checkpoint",
    "batch",
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `send`, `watch`, `stop`, `dlq` and `bus-key`."""
    send = commands.add_parser(
        "send",
        help="ask a running experiment for something",
        description="Sends one command to a run that was started with `esper grow --bus`.",
    )
    _where(send)
    send.add_argument("kind", choices=KINDS, metavar="COMMAND", help=", ".join(KINDS))
    send.add_argument("--site", metavar="NAME", help="of the seed; left out, --seed counts all")
    send.add_argument("--seed", type=_whole, metavar="N", help="number of the seed")
    send.add_argument("--blueprint", metavar="NAME", help="for germinate")
    send.add_argument("--graft", metavar="NAME", help="for germinate and set-graft")
    send.add_argument("--target", metavar="STAGE", help="for transition")
    send.add_argument("--file", metavar="PATH", help="for batch: a JSON list of commands")
    send.add_argument(
        "--expires", type=_seconds, metavar="S", help="refuse it when it is older than that"
    )
    send.add_argument("--id", metavar="ID", help="the same id again is answered, not repeated")
    send.add_argument(
        "--wait",
        type=_seconds,
        nargs="?",
        const=30.0,
        metavar="S",
        help="wait for what becomes of it, 30 s unless told",
    )
    send.set_defaults(run=_later("_steer", "send"))

    watch = commands.add_parser("watch", help="show a running experiment live")
    _where(watch)
    watch.add_argument("--seconds", type=_seconds, default=math.inf, metavar="S", help="end then")
    watch.add_argument(
        "--metrics-port",
        type=_port,
        metavar="N",
        help="also serve Prometheus metrics at http://127.0.0.1:N/metrics",
    )
    watch.set_defaults(run=_later("_watch", "watch"))

    stop = commands.add_parser("stop", help="end a running experiment at its next step")
    _where(stop)
    stop.add_argument("--reason", default="", metavar="TEXT", help="for the record")
    stop.add_argument("--wait", type=_seconds, default=30.0, metavar="S", help="for its answer")
    stop.set_defaults(run=_later("_steer", "stop"))

    dlq = commands.add_parser("dlq", help="messages that were set aside: dead letters")
    _where(dlq)
    dlq.add_argument("what", choices=("list", "show", "replay", "drop"), metavar="ACTION")
    dlq.add_argument("letters", nargs="*", metavar="LETTER", help="names, as `list` shows them")
    dlq.set_defaults(run=_later("_steer", "dlq"))

    key = commands.add_parser("bus-key", help="make a key for $ESPER_BUS_KEYS")
    key.add_argument("--name", default="first", metavar="ID")
    key.set_defaults(run=_later("_steer", "key"))


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bus",
        default=os.environ.get(ADDRESS_VARIABLE, DEFAULT_ADDRESS),
        metavar="ADDRESS",
        help=f"redis://HOST:PORT/DB or unix://PATH (${ADDRESS_VARIABLE}, or {DEFAULT_ADDRESS})",
    )
    parser.add_argument(
        "--run", dest="run_name", metavar="NAME", help="the only living one, where left out"
    )


def _later(module: str, name: str) -> Callable[..., int]:
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
