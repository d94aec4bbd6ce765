"""A command has one name in the core, on the bus and on the command line."""

from __future__ import annotations

import inspect

import msgspec
import pytest

from esper_fn import bus, commands
from esper_fn._verbs import RUN_VERBS, SEED_VERBS, VERBS
from esper_fn.cli._arguments import SENT_VERBS

CLASSES = {bus.verb(kind): kind for kind in bus.COMMANDS}


def test_the_table_the_messages_and_the_command_line_have_the_same_verbs():
    assert set(CLASSES) == set(VERBS)
    assert {name.replace("-", "_") for name in SENT_VERBS} == set(VERBS) - {"stop"}
    assert not set(RUN_VERBS) & set(vars(commands)) - {"batch"}  # nobody confuses run and seed


@pytest.mark.parametrize("verb", SEED_VERBS)
def test_a_message_to_a_seed_has_the_arguments_of_the_cores_function(verb):
    kind = CLASSES[verb]
    assert issubclass(kind, bus.SeedCommand)
    own = {field.name for field in msgspec.structs.fields(kind)}
    own -= {field.name for field in msgspec.structs.fields(bus.Command)}
    parameters = inspect.signature(getattr(commands, verb)).parameters
    assert own == {*parameters, "site"}


@pytest.mark.parametrize("verb", RUN_VERBS)
def test_a_message_to_a_run_is_for_no_single_seed(verb):
    assert not issubclass(CLASSES[verb], bus.SeedCommand)
