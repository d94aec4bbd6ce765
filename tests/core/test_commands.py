"""Commands, their outcomes, and what people are told of those that cannot be sent."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import NONE, limits, place, row, silent, small, state_faults, strict

import esper_fn as ef
from esper_fn.commands import (
    Code,
    Command,
    Commands,
    Kind,
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
from esper_fn.errors import CommandError, UnknownNameError
from esper_fn.lifecycle import Cause, Stage
from esper_fn.lifecycle._commands import no_commands

S = Stage


def send(state: Any, *commands: Command, **step: Any) -> tuple[Any, Any, list[Code]]:
    after, info = small().step(state, commands, **step)
    return after, info, [Code(code) for code in np.asarray(info.outcomes.code).tolist()]


def at(*stages: int, **columns: Any) -> Any:
    rig = small()
    return place(rig.growth, rig.fresh(), [*stages, *[0] * (7 - len(stages))], **columns)


def raw(**columns: list[int]) -> Commands:
    """Rows as arrays, past every check of `pack`."""
    told = np.array(no_commands(8).packed)
    names = ("seed", "kind", "blueprint", "graft", "target", "batch")
    for name, values in columns.items():
        told[names.index(name), : len(values)] = values
    return Commands(jnp.asarray(told))


def send_raw(state: Any, commands: Commands) -> tuple[Any, Any]:
    return small().update(state, state.adapters, silent(7), jnp.float32(1.0), commands)


# --- every code ----------------------------------------------------------------------------------


def test_not_asked() -> None:
    after, info, codes = send(at())
    assert codes == [Code.NOT_ASKED] * 8
    assert np.asarray(info.outcomes.before).tolist() == [NONE] * 8
    assert np.asarray(info.outcomes.after).tolist() == [NONE] * 8
    assert np.asarray(info.request_code).tolist() == [Code.NOT_ASKED] * 7
    assert (np.asarray(after.owner) == NONE).all()


def test_done_by_every_kind() -> None:
    state = at(
        S.DORMANT, S.TRAINING, S.DORMANT, S.GERMINATED, S.ROLLED_BACK, S.GRAFTING, S.GRAFTING
    )
    state = limits(state, embargo_steps=17)
    state = state._replace(
        seeds=state.seeds._replace(is_paused=state.seeds.is_paused.at[6].set(True))
    )
    after, info, codes = send(
        state,
        germinate(0, "scale", "stability"),
        cull(1),
        cancel(3),
        release(4),
        pause_seed(5),
        resume_seed(6),
    )
    assert codes == [Code.DONE] * 6 + [Code.NOT_ASKED] * 2
    assert np.asarray(after.seeds.stage).tolist() == [1, 8, 0, 9, 0, 3, 3]
    assert np.asarray(after.seeds.is_paused).tolist() == [False] * 5 + [True, False]
    assert np.asarray(after.seeds.embargo_steps).tolist() == [0, 17, 0, 17, 0, 0, 0]
    assert np.asarray(info.outcomes.before)[:6].tolist() == [0, 2, 1, 10, 3, 3]
    assert np.asarray(info.outcomes.after)[:6].tolist() == [1, 8, 9, 0, 3, 3]
    assert int(after.seeds.graft[0]) == 1
    assert not state_faults(small().growth, after)
    after, info, codes = send(state, set_graft(5, "stability"), roll_back(1))
    assert codes[:2] == [Code.DONE] * 2
    assert int(after.seeds.graft[5]) == 1
    assert int(after.seeds.stage[1]) == S.ROLLED_BACK
    assert int(info.cause[1]) == Cause.COMMAND


@pytest.mark.parametrize("seed", [-1, -8, 7, 8, 10**6, -(2**31), 2**31 - 1])
def test_unknown_seed_does_nothing(seed: int) -> None:
    state = at(S.TRAINING)
    control, _, _ = send(state)
    after, info = send_raw(state, raw(seed=[seed], kind=[Kind.TRANSITION], target=[S.CULLED]))
    assert int(info.outcomes.code[0]) == Code.UNKNOWN_SEED
    assert int(info.outcomes.before[0]) == int(info.outcomes.after[0]) == NONE
    assert_same(after, control)


@pytest.mark.parametrize("kind", [-128, -1, 6, 100, 127, 257, -255, 2**31 - 1])
def test_unknown_kind_does_nothing(kind: int) -> None:
    state = at(S.TRAINING)
    control, _, _ = send(state)
    columns = {"seed": [0], "kind": [kind], "blueprint": [0], "graft": [0], "target": [S.CULLED]}
    after, info = send_raw(state, raw(**columns))
    assert int(info.outcomes.code[0]) == Code.UNKNOWN_KIND
    assert int(info.outcomes.before[0]) == int(info.outcomes.after[0]) == S.TRAINING
    assert_same(after, control)


@pytest.mark.parametrize("shape", [(3, 8), (8,), (2, 6, 8)])
def test_commands_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CommandError, match="last axis"):
        send_raw(at(S.TRAINING), Commands(jnp.full(shape, NONE, jnp.int32)))


@pytest.mark.parametrize("target", [-128, -1, 11, 127, 256 + int(S.CULLED)])
def test_a_target_that_is_no_stage_is_illegal(target: int) -> None:
    state = at(S.TRAINING)
    after, info = send_raw(state, raw(seed=[0], kind=[Kind.TRANSITION], target=[target]))
    assert int(info.outcomes.code[0]) == Code.ILLEGAL_TRANSITION
    assert int(after.seeds.stage[0]) == S.TRAINING


def test_blueprint_not_served() -> None:
    state = at()
    control, _, _ = send(state)
    after, _, codes = send(state, germinate(0, "conv"), germinate(3, "conv"))
    assert codes[:2] == [Code.BLUEPRINT_NOT_SERVED, Code.DONE]
    assert row(after.seeds, 0) == row(control.seeds, 0)
    for blueprint in (-1, 2, 127, -128):
        _, info = send_raw(
            state, raw(seed=[3], kind=[Kind.GERMINATE], blueprint=[blueprint], graft=[0])
        )
        assert int(info.outcomes.code[0]) == Code.BLUEPRINT_NOT_SERVED


@pytest.mark.parametrize("graft", [2, 127, -2])
def test_unknown_graft(graft: int) -> None:
    state = at(S.GRAFTING)
    control, _, _ = send(state)
    both = raw(
        seed=[0, 1], kind=[Kind.SET_GRAFT, Kind.GERMINATE], blueprint=[0, 0], graft=[graft, graft]
    )
    after, info = send_raw(state, both)
    assert np.asarray(info.outcomes.code)[:2].tolist() == [Code.UNKNOWN_GRAFT] * 2
    assert_same(after, control)
    # A germination without one takes the first schedule, SET_GRAFT must name one.
    neither = raw(seed=[0, 1], kind=[Kind.SET_GRAFT, Kind.GERMINATE], blueprint=[0, 0])
    _, info = send_raw(state, neither)
    assert np.asarray(info.outcomes.code)[:2].tolist() == [Code.UNKNOWN_GRAFT, Code.DONE]


def test_a_full_bank_is_refused_and_nothing_changes() -> None:
    state = at(S.TRAINING, S.FOSSILIZED)
    control, _, _ = send(state)
    after, info, codes = send(state, germinate(2, "scale"))
    assert codes[0] == Code.BANK_FULL
    assert int(info.outcomes.after[0]) == S.DORMANT
    assert_same(after, control)


def test_requests_beyond_the_room_are_refused_in_the_order_of_the_seeds() -> None:
    after, _, codes = send(
        at(), germinate(2, "scale"), germinate(1, "scale"), germinate(0, "scale")
    )
    assert codes[:3] == [Code.BANK_FULL, Code.DONE, Code.DONE]
    assert np.asarray(after.seeds.slot)[:3].tolist() == [0, 1, NONE]


def test_a_slot_freed_in_a_step_serves_the_next_one() -> None:
    state = at(S.TRAINING, S.TRAINING)
    after, _, codes = send(state, cull(0), germinate(2, "scale"))
    assert codes[:2] == [Code.DONE, Code.BANK_FULL]
    after, _, codes = send(after, germinate(2, "scale"))
    assert codes[0] == Code.DONE
    assert int(after.seeds.slot[2]) == int(state.seeds.slot[0])


def test_embargoed() -> None:
    state = at(S.CULLED, S.CANCELLED, S.ROLLED_BACK, embargo_steps=3)
    _, _, codes = send(state, release(0), release(1), release(2))
    assert codes[:3] == [Code.EMBARGOED, Code.EMBARGOED, Code.DONE]


def test_vetoed() -> None:
    state = at(S.TRAINING)
    state = state._replace(governor=state.governor._replace(veto=jnp.ones((), bool)))
    after, _, codes = send(state, germinate(1, "scale"), cull(0))
    assert codes[:2] == [Code.VETOED, Code.DONE]
    assert int(after.seeds.stage[1]) == S.DORMANT


def test_duplicate() -> None:
    after, info, codes = send(
        at(S.TRAINING),
        cull(0),
        cancel(0),
        germinate(1, "scale"),
        roll_back(0),
        germinate(1, "scale"),
    )
    assert codes[:5] == [Code.DONE, Code.DUPLICATE, Code.DONE, Code.DUPLICATE, Code.DUPLICATE]
    assert int(after.seeds.stage[0]) == S.CULLED
    assert np.asarray(info.outcomes.after)[:2].tolist() == [S.CULLED] * 2


def test_a_refused_first_command_is_still_the_first() -> None:
    after, _, codes = send(at(S.TRAINING), transition(0, S.FOSSILIZED), cull(0))
    assert codes[:2] == [Code.ILLEGAL_TRANSITION, Code.DUPLICATE]
    assert int(after.seeds.stage[0]) == S.TRAINING


def test_overruled_by_a_broken_adapter_and_by_the_governor() -> None:
    state = at(S.GRAFTING, S.FINE_TUNING)
    state = state._replace(
        governor=state.governor._replace(quarantine=jnp.zeros((7,), bool).at[1].set(True))
    )
    broken = silent(7)._replace(num_errors=jnp.zeros((7,)).at[0].set(1.0))
    after, info, codes = send(state, transition(0, S.STABILIZATION), pause_seed(1), reading=broken)
    assert codes[:2] == [Code.OVERRULED] * 2
    assert np.asarray(after.seeds.stage)[:2].tolist() == [S.ROLLED_BACK] * 2
    assert np.asarray(info.cause)[:2].tolist() == [Cause.NON_FINITE, Cause.GOVERNOR]
    assert np.asarray(info.outcomes.after)[:2].tolist() == [S.ROLLED_BACK] * 2
    assert not np.asarray(after.seeds.is_paused).any()


@pytest.mark.parametrize("stage", [0, 7, 8, 9, 10])
def test_no_adapter(stage: int) -> None:
    state = at(*[stage] * 2, embargo_steps=5)
    control, _, _ = send(state)
    after, _, codes = send(state, pause_seed(0), resume_seed(1))
    assert codes[:2] == [Code.NO_ADAPTER] * 2
    after, _, codes = send(state, set_graft(0, "stability"))
    assert codes[0] == Code.NO_ADAPTER
    assert_same(after, control)


def test_every_code_is_tested_here() -> None:
    with open(__file__) as file:
        text = file.read()
    missing = [code.name for code in Code if f"Code.{code.name}" not in text]
    assert not missing


def assert_same(after: Any, control: Any) -> None:
    """Bit-equal states; the keys too, since both took one step."""
    told = [state._replace(key=jax.random.key_data(state.key)) for state in (after, control)]
    for a, b in zip(*map(jax.tree.leaves, told), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- commands and policies, commands and gates ---------------------------------------------------


def test_commands_come_before_policies() -> None:
    policy = ef.policies.scripted([(0, cull(0)), (0, cull(1))])
    layout = small().growth.layout
    growth = ef.Growth(
        **layout.arguments, policy=policy, governor=ef.governors.disabled(), adapters_at_once=None
    )
    state = place(growth, growth.init(jax.random.key(0)), [2, 2, 0, 0, 0, 0, 0])
    commands = growth.commands([roll_back(0)])
    update = jax.jit(growth.update)
    after, info = update(state, state.adapters, silent(7), jnp.float32(1.0), commands)
    assert np.asarray(after.seeds.stage)[:2].tolist() == [S.ROLLED_BACK, S.CULLED]
    assert np.asarray(info.cause)[:2].tolist() == [Cause.COMMAND, Cause.POLICY]
    assert growth.policy.rules[int(info.requested_by[1])] == "scripted"


def test_a_command_comes_before_the_gates_and_needs_none() -> None:
    state = at(S.GRAFTING, S.TRAINING, alpha=[1.0, *[0.0] * 6], steps_in_stage=0)
    after, info, codes = send(state, cull(0), transition(1, S.GRAFTING))
    assert codes[:2] == [Code.DONE] * 2
    assert np.asarray(after.seeds.stage)[:2].tolist() == [S.CULLED, S.GRAFTING]
    assert np.asarray(info.cause)[:2].tolist() == [Cause.COMMAND] * 2
    assert float(after.seeds.alpha[1]) == 0.0


# --- people's side -------------------------------------------------------------------------------


def pack(*commands: Command, size: int = 4) -> Commands:
    return small().growth.commands(commands, size)


def test_pack_fills_rows() -> None:
    told = pack(germinate(4, "conv", "stability"), cull(2), pause_seed(3))
    assert told.seed.tolist() == [4, 2, 3, NONE]
    assert told.kind.tolist() == [Kind.GERMINATE, Kind.TRANSITION, Kind.PAUSE, Kind.NONE]
    assert told.blueprint.tolist() == [1, NONE, NONE, NONE]
    assert told.graft.tolist() == [1, NONE, NONE, NONE]
    assert told.target.tolist() == [NONE, S.CULLED, NONE, NONE]
    empty = no_commands(4)
    assert [column.dtype for column in told] == [column.dtype for column in empty]
    assert [column.tolist() for column in pack()] == [column.tolist() for column in empty]
    assert pack(size=0).size == 0
    kinds = [told.seed, told.kind, told.blueprint, told.graft, told.target, told.batch]
    assert [of.dtype.itemsize for of in kinds] == [4, 1, 1, 1, 1, 4]


def test_commands_may_be_left_out() -> None:
    growth = small().growth
    state = at(S.TRAINING)
    with strict():
        after, info = jax.eval_shape(
            growth.update, state, state.adapters, silent(7), jnp.float32(1)
        )
    assert info.outcomes.code.shape == (1,)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("commands", "error", "value", "allowed", "remedy"),
    [
        ([pause_seed(0)] * 5, CommandError, "5 commands", "4 rows", "size="),
        ([pause_seed(7)], CommandError, "seed 7", "0..6", "seed_index"),
        ([pause_seed(-1)], CommandError, "seed -1", "0..6", "seed_index"),
        (
            [germinate(0, "rope")],
            UnknownNameError,
            "'rope'",
            "conv, scale",
            "Growth(blueprints=...)",
        ),
        (
            [set_graft(0, "cubic")],
            UnknownNameError,
            "'cubic'",
            "linear, stability",
            "Growth(graft=...)",
        ),
    ],
)
def test_pack_says_what_is_wrong_what_is_allowed_and_what_to_do(
    commands: list[Command], error: type[Exception], value: str, allowed: str, remedy: str
) -> None:
    with pytest.raises(error) as caught:
        pack(*commands)
    message = str(caught.value)
    assert value in message
    assert allowed in message
    assert remedy in message
    assert isinstance(caught.value, ValueError)


def test_a_transition_names_a_real_stage() -> None:
    with pytest.raises(ValueError, match="99"):
        transition(0, 99)  # type: ignore[arg-type]


def test_a_batch_takes_force_whole_or_not_at_all():
    state = at(S.DORMANT, S.DORMANT, S.TRAINING, S.GRAFTING)
    whole = batch([germinate(0, "scale"), cull(2)])
    after, _, codes = send(state, *whole)
    assert codes[:2] == [Code.DONE, Code.DONE]
    assert after.seeds.stage[:3].tolist() == [S.GERMINATED, S.DORMANT, S.CULLED]
    # Seed 1 sleeps and cannot be culled; seed 3 is asked for on its own.
    after, _, codes = send(state, *batch([germinate(0, "scale"), cull(1), cull(2)]), cull(3))
    assert codes[:4] == [
        Code.BATCH_REFUSED,
        Code.ILLEGAL_TRANSITION,
        Code.BATCH_REFUSED,
        Code.DONE,
    ]
    assert after.seeds.stage[:4].tolist() == [S.DORMANT, S.DORMANT, S.TRAINING, S.CULLED]
    assert int((after.owner != state.owner).sum()) == 1


def test_a_batch_with_a_row_nobody_can_answer_for_is_refused():
    state = at(S.DORMANT, S.DORMANT, S.TRAINING)
    rows = raw(
        seed=[0, 99, 2, 1, 1],
        kind=[Kind.GERMINATE, Kind.GERMINATE, Kind.TRANSITION, Kind.GERMINATE, Kind.GERMINATE],
        blueprint=[0, 0, NONE, 0, 0],
        target=[NONE, NONE, S.CULLED, NONE, NONE],
        batch=[0, 0, NONE, 1, 1],
    )
    after, info = send_raw(state, rows)
    assert [Code(code) for code in info.outcomes.code[:5].tolist()] == [
        Code.BATCH_REFUSED,
        Code.UNKNOWN_SEED,
        Code.DONE,
        Code.BATCH_REFUSED,
        Code.DUPLICATE,
    ]
    assert after.seeds.stage[:3].tolist() == [S.DORMANT, S.DORMANT, S.CULLED]
