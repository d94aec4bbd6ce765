"""Commands for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from esper_fn.lifecycle import Stage
from esper_fn.lifecycle._commands import Kind
from esper_fn.lifecycle._stages import as_stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command, for people. Make one with the functions of this module."""

    kind: Kind
    seed: int
    blueprint: str | None = None
    graft: str | None = None
    target: Stage | None = None
    batch: str | None = None
    """Commands with the same name are applied together or not at all; see `batch`."""


# Without leaves, so that one passed into a `jit` in place of `Commands` reaches our message.
jax.tree_util.register_static(Command)


def batch(commands: Sequence[Command], name: str = "batch") -> list[Command]:
    """Commands of one step that are applied together or not at all.

    >>> [c.batch for c in batch([cull(1), cull(2)])]
    ['batch', 'batch']
    """
    return [replace(command, batch=name) for command in commands]


def germinate(seed: int, blueprint: str, graft: str | None = None) -> Command:
    """Give a dormant seed a newborn adapter."""
    return Command(kind=Kind.GERMINATE, seed=seed, blueprint=blueprint, graft=graft)


def transition(seed: int, target: Stage) -> Command:
    """Move a seed to a stage that may follow its own."""
    return Command(kind=Kind.TRANSITION, seed=seed, target=as_stage(target, "target"))


def cull(seed: int) -> Command:
    """Remove a seed's adapter."""
    return transition(seed, Stage.CULLED)


def cancel(seed: int) -> Command:
    """Call off a seed that does not act yet."""
    return transition(seed, Stage.CANCELLED)


def roll_back(seed: int) -> Command:
    """Remove a seed's adapter and keep the seed out for a quarantine, or until it is released."""
    return transition(seed, Stage.ROLLED_BACK)


def release(seed: int) -> Command:
    """Let a rolled-back seed sleep and grow again; also resets a fossil, whose adapter is lost."""
    return transition(seed, Stage.DORMANT)


def set_graft(seed: int, graft: str) -> Command:
    """Change a seed's alpha schedule."""
    return Command(kind=Kind.SET_GRAFT, seed=seed, graft=graft)


def pause_seed(seed: int) -> Command:
    """Freeze a seed's stage and alpha until `resume_seed`; its adapter goes on training."""
    return Command(kind=Kind.PAUSE, seed=seed)


def resume_seed(seed: int) -> Command:
    """End the pause of a seed."""
    return Command(kind=Kind.RESUME, seed=seed)
