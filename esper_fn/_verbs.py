"""The commands there are: one table for the core, the bus and the command line.

A verb has one name in all three layers. `germinate` is `esper_fn.commands.germinate`, the message
`bus.Germinate` with the tag `germinate/1`, and `esper send germinate`; with underscores here and
dashes on the command line. Commands to a run have no function in the core, whose steps never wait.
"""

from __future__ import annotations

from types import MappingProxyType

SEED_VERBS = MappingProxyType(
    {
        "germinate": "give a dormant seed an adapter",
        "transition": "move a seed to a stage that may follow its own",
        "set_graft": "change the alpha schedule of a seed",
        "cull": "remove the adapter of a seed",
        "cancel": "remove an adapter that does not act yet",
        "roll_back": "remove an adapter and quarantine its seed",
        "release": "end a quarantine or a fossil; the seed becomes dormant",
        "pause_seed": "freeze the stage and alpha of a seed",
        "resume_seed": "end the pause of a seed",
    }
)
"""Commands to one seed; a batch holds several of them."""

RUN_VERBS = MappingProxyType(
    {
        "batch": "apply several commands to seeds in one step, or none of them",
        "pause": "halt the run at its next step boundary",
        "resume": "end the pause of the run",
        "checkpoint": "save the run at its next step boundary",
        "stop": "end the run at its next step boundary, ahead of all other commands",
    }
)
"""Commands to the run as a whole."""

VERBS = MappingProxyType({**SEED_VERBS, **RUN_VERBS})
"""What each command does, by verb."""
