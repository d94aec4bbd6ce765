"""`esper send`, `esper stop`, `esper dlq`, and the bus of `esper grow`."""

from __future__ import annotations

import argparse
import getpass
from collections.abc import Iterator
from typing import Any

import msgspec

from esper_fn import bus
from esper_fn.bus._address import parse_address
from esper_fn.cli._arguments import ADDRESS_VARIABLE
from esper_fn.cli._say import say
from esper_fn.errors import BusError, NobodyListensError

_MOST_LETTERS = 2_000
_LETTERS_AT_ONCE = 20
_CLASSES = {bus.verb(kind).replace("_", "-"): kind for kind in bus.COMMANDS}
_OPTIONS = ("site", "seed", "blueprint", "graft", "target", "file")
_MAX_BATCH_BYTES = 256 * 1024
APPLIED, REFUSED = 0, 1


def prepare(options: argparse.Namespace, growth: Any) -> Any:
    """Prepares the steering of `esper grow --bus`; raises at once if the bus cannot be used."""
    from esper_fn import runtime

    name = options.run_name or f"{options.data}-{options.seed}"
    shown = parse_address(options.bus).shown
    with bus.connect(options.bus, run=name) as client:
        if name in client.active_runs():
            raise BusError(
                f"a run named {name!r} is active on {shown}; choose another name with --run"
            )
    steering = runtime.steer(options.bus, growth, run=name)
    if not parse_address(options.bus).is_memory:
        say(f"steer it with: esper send COMMAND --bus {shown} --run {name}", to_stderr=True)
    return steering


def connect(options: argparse.Namespace) -> bus.Client:
    """Connects to the named run, or to the only active one."""
    if parse_address(options.bus).is_memory:
        raise BusError(
            "the bus `memory` lies inside the process of its run; start the run with --bus "
            f"redis://... and name the same address here, or in ${ADDRESS_VARIABLE}"
        )
    if options.run_name is not None:
        return bus.connect(options.bus, run=options.run_name)
    with bus.connect(options.bus, run="any") as anyone:
        active = anyone.active_runs()
    if len(active) != 1:
        names = ", ".join(active[:20]) + (", ..." if len(active) > 20 else "")
        raise NobodyListensError(
            f"{len(active)} runs are active on {parse_address(options.bus).shown}: "
            f"{names or 'none'}; "
            + ("name one with --run" if active else "start one with `esper grow --bus`")
        )
    return bus.connect(options.bus, run=active[0])


def send(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Sends one command."""
    command = _command(parser, options)
    with connect(options) as client:
        outcome = client.send(command, wait_seconds=options.wait)
    if outcome is None:
        say(f"accepted: {command.id}")
        return APPLIED
    return _show(outcome)


def stop(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Stops a run."""
    del parser
    command = bus.Stop(reason=options.reason, sender=_sender())
    with connect(options) as client:
        outcome = client.send(command, wait_seconds=options.wait)
    return _show(outcome)


def dlq(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Lists, shows, replays or drops dead letters."""
    if options.action != "list" and not options.letters:
        parser.error(f"dlq {options.action}: name the letters; `esper dlq list` shows them")
    with connect(options) as client:
        if options.action == "list":
            count = 0
            for name, letter in _letters(client):
                count += 1
                say(f"{name}  {letter.reason:<12} {letter.size_bytes:>8} bytes  {letter.text}")
            say(f"{count} dead letters")
            return APPLIED
        letters = {name: letter for name, letter in _letters(client) if name in options.letters}
        if unknown := [name for name in options.letters if name not in letters]:
            raise BusError(f"no dead letter {unknown[0]!r}; `esper dlq list` shows them")
        for name in options.letters:
            if options.action == "show":
                for field, value in msgspec.structs.asdict(letters[name]).items():
                    say(f"{field}: {value!r}")
            elif options.action == "replay":
                say(f"{name} sent again: {', '.join(client.replay(name))}")
        if options.action == "drop":
            say(f"{client.drop(options.letters)} dropped")
    return APPLIED


def _letters(client: bus.Client) -> Iterator[tuple[str, bus.DeadLetter]]:
    """Reads dead letters, oldest first, a few at a time, since each may be large."""
    after: dict[str, str] = {}
    for _ in range(_MOST_LETTERS // _LETTERS_AT_ONCE):
        page = client.dead_letters(**after, limit=_LETTERS_AT_ONCE)
        yield from page
        if not page:
            return
        after["after"] = page[-1][0]


def key(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Prints a fresh key."""
    name = options.name
    if not (name.isascii() and name.isidentifier() and len(name) <= 64):
        parser.error(f"argument --name: {name!r} must be letters, digits and _, at most 64")
    say(bus.new_key(name))
    return APPLIED


def _command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bus.Command:
    """The command that the options describe; a wrong or missing option ends the program."""
    verb, kind = options.verb, _CLASSES[options.verb]
    allowed = {field.name: field.required for field in msgspec.structs.fields(kind)}
    if verb == "batch":
        allowed["file"] = True
    for name in _OPTIONS:
        is_set = getattr(options, name) is not None
        if is_set and name not in allowed:
            parser.error(f"send {verb}: --{name} does not belong to it")
        if not is_set and allowed.get(name, False):
            parser.error(f"send {verb}: --{name} is missing")
    fields = {name: getattr(options, name) for name in _OPTIONS if name in allowed}
    if verb == "batch":
        parts = _read_batch(parser, fields.pop("file"))
        fields["commands"] = [_tagged(parser, part) for part in parts]
    fields |= {"id": options.id, "expires_after_seconds": options.expires, "sender": _sender()}
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        return msgspec.convert({"kind": kind.__struct_config__.tag, **fields}, kind)
    except msgspec.ValidationError as error:
        parser.error(f"send {verb}: {error}")


def _read_batch(parser: argparse.ArgumentParser, name: str) -> list[Any]:
    with open(name, "rb") as file:
        data = file.read(_MAX_BATCH_BYTES + 1)
    if len(data) > _MAX_BATCH_BYTES:
        parser.error(f"send batch: --file {name} is longer than {_MAX_BATCH_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=list[Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        parser.error(f"send batch: --file {name} is no JSON list of commands: {error}")


def _tagged(parser: argparse.ArgumentParser, part: Any) -> Any:
    if not isinstance(part, dict) or str(part.get("kind")) not in _CLASSES:
        parser.error('send batch: --file must hold a list like [{"kind": "cull", "seed": 3}]')
    return {**part, "kind": _CLASSES[part["kind"]].__struct_config__.tag}


def _sender() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _show(outcome: bus.Outcome | None) -> int:
    if outcome is None:
        return APPLIED
    say(f"{outcome.code}" + (f": {outcome.text}" if outcome.text else ""))
    for seed in outcome.seeds:
        say(f"  seed {seed.seed}: {seed.code}, {seed.before} to {seed.after}")
    if outcome.step >= 0:
        say(f"  step {outcome.step}")
    return APPLIED if outcome.is_applied else REFUSED
