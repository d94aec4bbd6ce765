"""Commands: what a person asks of seeds, and what becomes of it.

>>> from esper_fn import commands
>>> commands.germinate(3, "low_rank").kind.name
'GERMINATE'
"""

from esper_fn.commands._factories import (
    Command,
    batch,
    cancel,
    cull,
    germinate,
    pause_seed,
    release,
    resume_seed,
    roll_back,
    set_graft,
    transition,
)
from esper_fn.lifecycle._commands import Code, Commands, Kind, Outcomes

__all__ = [
    "Code",
    "Command",
    "Commands",
    "Kind",
    "Outcomes",
    "batch",
    "cancel",
    "cull",
    "germinate",
    "pause_seed",
    "release",
    "resume_seed",
    "roll_back",
    "set_graft",
    "transition",
]
