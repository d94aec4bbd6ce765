"""`esper send`, `esper stop`, `esper dlq`, and the bus of `esper grow`."""

from __future__ import annotations

import argparse
import getpass
from collections.abc import Iterator
from typing import Any

import msgspec

from esper_fn import bus
from esper_fn.cli._arguments import ADDRESS_VARIABLE
from esper_fn.cli._say import say
from esper_fn.errors import BusError, NobodyListensError

_MOST_LETTERS = 2_000
_LETTERS_AT_ONCE = 20
_CLASSES: dict[str, type[bus.Command]] = {
    "germinate": bus.Germinate,
    "transition": bus.Transition,
    "set-graft": bus.SetGraft,
    "cull": bus.Cull,
    "cancel": bus.Cancel,
    "roll-back": bus.RollBack,
    "release": bus.Release,
    "hold": bus.HoldSeed,
    "let-go": bus.LetSeedGo,
    "pause": bus.Pause,
    "resume": bus.Resume,
    "checkpoint": bus.Checkpoint,
    "batch": bus.Batch,
}
_OPTIONS = ("site", "seed", "blueprint", "graft", "target", "file")
_MAX_BATCH_BYTES = 256 * 1024
DONE, NOT_DONE = 0, 1


def prepare(options: argparse.Namespace, growth: Any) -> Any:
    """The steering of `esper grow --bus`; whatever is wrong with the bus is said at once."""
    from esper_fn import runtime

    name = options.run_name or f"{options.data}-{options.seed}"
    shown = bus.parse_address(options.bus).shown
    with bus.connect(options.bus, run=name) as client:
        if name in client.living():
            raise BusError(f"a run named {name!r} lives on {shown}; choose another name with --run")
    steering = runtime.steer(options.bus, growth, run=name)
    if not bus.parse_address(options.bus).is_memory:
        say(f"steer it with: esper send COMMAND --bus {shown} --run {name}", to_stderr=True)
    return steering


def connect(options: argparse.Namespace) -> bus.Client:
    """A client to the named run, or to the only one there is."""
    if bus.parse_address(options.bus).is_memory:
        raise BusError(
            "the bus `memory` lies inside the process of its run; start the run with --bus "
            f"redis://... and name the same address here, or in ${ADDRESS_VARIABLE}"
        )
    if options.run_name is not None:
        return bus.connect(options.bus, run=options.run_name)
    with bus.connect(options.bus, run="any") as anyone:
        living = anyone.living()
    if len(living) != 1:
        names = ", ".join(living[:20]) + (", ..." if len(living) > 20 else "")
        raise NobodyListensError(
            f"{len(living)} runs live on {bus.parse_address(options.bus).shown}: "
            f"{names or 'none'}; "
            + ("name one with --run" if living else "start one with `esper grow --bus`")
        )
    return bus.connect(options.bus, run=living[0])


def send(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Sends one command."""
    command = _command(parser, options)
    with connect(options) as client:
        outcome = client.send(command, wait_seconds=options.wait)
    if outcome is None:
        say(f"accepted: {command.id}")
        return DONE
    return _show(outcome)


def stop(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Stops a run."""
    del parser
    command = bus.EmergencyStop(reason=options.reason, sender=_sender())
    with connect(options) as client:
        outcome = client.send(command, wait_seconds=options.wait)
    return _show(outcome)


def dlq(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Shows and handles dead letters."""
    if options.what != "list" and not options.letters:
        parser.error(f"dlq {options.what}: name the letters; `esper dlq list` shows them")
    with connect(options) as client:
        if options.what == "list":
            count = 0
            for name, letter in _letters(client):
                count += 1
                say(f"{name}  {letter.reason:<12} {letter.size_bytes:>8} bytes  {letter.words}")
            say(f"{count} dead letters")
            return DONE
        wanted = set(options.letters)
        known = {name: letter for name, letter in _letters(client) if name in wanted}
        if unknown := [name for name in options.letters if name not in known]:
            raise BusError(f"no dead letter {unknown[0]!r}; `esper dlq list` shows them")
        for name in options.letters:
            if options.what == "show":
                letter = known[name]
                for key in letter.__struct_fields__:
                    say(f"{key}: {getattr(letter, key)!r}")
            elif options.what == "replay":
                say(f"{name} sent again: {', '.join(client.replay(name))}")
        if options.what == "drop":
            say(f"{client.drop(options.letters)} dropped")
    return DONE


def _letters(client: bus.Client) -> Iterator[tuple[str, bus.DeadLetter]]:
    """Dead letters, oldest first, a few at a time, since each may be large."""
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
    return DONE


def _command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bus.Command:
    kind = options.kind
    taken = {field.name: field for field in msgspec.structs.fields(_CLASSES[kind])}
    if kind == "batch":
        taken["file"] = taken["id"]
    for name in _OPTIONS:
        given = getattr(options, name) is not None
        if given and name not in taken:
            parser.error(f"send {kind}: --{name} does not belong to it")
        is_needed = name in taken and (name == "file" or taken[name].required)
        if is_needed and not given:
            parser.error(f"send {kind}: --{name} is missing")
    fields: dict[str, Any] = {name: getattr(options, name) for name in _OPTIONS if name in taken}
    fields.pop("file", None)
    if kind == "batch":
        fields["commands"] = [_tagged(parser, part) for part in _read_batch(parser, options.file)]
    fields = {name: value for name, value in fields.items() if value is not None}
    if options.id is not None:
        fields["id"] = options.id
    if options.expires is not None:
        fields["expires_after_seconds"] = options.expires
    tag = _CLASSES[kind].__struct_config__.tag
    try:
        return msgspec.convert({"kind": tag, "sender": _sender(), **fields}, _CLASSES[kind])
    except msgspec.ValidationError as error:
        parser.error(f"send {kind}: {error}")


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
        return DONE
    say(f"{outcome.code}" + (f": {outcome.words}" if outcome.words else ""))
    for seed in outcome.seeds:
        say(f"  seed {seed.seed}: {seed.code}, {seed.before} to {seed.after}")
    if outcome.step >= 0:
        say(f"  step {outcome.step}")
    return DONE if outcome.is_done else NOT_DONE
