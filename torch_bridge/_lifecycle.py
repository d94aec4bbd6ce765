"""The lifecycle as the core's jitted functions on JAX's CPU device, with NumPy at its edges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import esper_fn as ef
from esper_fn.commands import Command
from esper_fn.lifecycle import NONE
from esper_fn.types import Statistics
from torch_bridge import _saved
from torch_bridge._convert._devices import cpu_device
from torch_bridge._errors import BridgeError
from torch_bridge._packing import ArrayPacker

Arrays = dict[str, np.ndarray]


def _do_nothing(*arguments: Any) -> None:
    del arguments


MIN_ROWS = 4
"""Rows for commands in most steps."""


class _Output(NamedTuple):
    """What the host reads of a step."""

    gains: Any
    """float32[Q, 4]: the columns of `Gains` of every slot."""
    owner: Any
    """int32[Q]."""
    stage: Any
    """int8[S]."""
    is_born: Any
    """bool[Q]."""
    info: Any = None
    key: Any = None
    """The random key of the step's newborns."""


class _Program:
    """The compiled step for one number of rows of commands."""

    def __init__(self, growth: ef.Growth, state: ArrayPacker) -> None:
        self._growth, self._state = growth, state
        self._output: Any = None
        """The `ArrayPacker` of the output, known once the program was traced."""
        self._run = jax.jit(self._trace)

    def __call__(self, state: Any, measured: np.ndarray, commands: Any) -> tuple[Any, _Output]:
        after, output = self._run(state, measured, commands)
        read: _Output = self._output.read(np.asarray(output))
        return after, read

    def _trace(self, packed: Any, measured: Any, commands: Any) -> tuple[Any, Any]:
        state = self._state.unpack(packed)
        after, output = _advance(self._growth, state, measured, commands)
        self._output = ArrayPacker(output)
        return self._state.pack(after), self._output.pack(output)


class Lifecycle:
    """The state of every seed, and the compiled functions that move it.

    From step to step the state is one array, and so is all that the host learns of a step: the
    program moves some hundred small ones, which would take longer to hand over than to compute.
    """

    def __init__(self, growth: ef.Growth, seed: int) -> None:
        self.device = cpu_device()
        self.on_load: Callable[[], None] = _do_nothing
        self.make_room: Callable[[int], None] = _do_nothing
        """Gives the model room for more adapters, where a checkpoint holds them."""
        self.is_driven = False
        """Whether a bridge moves it; a copied model's rests until its record is written."""
        self.age = 0
        """How often it has changed."""
        self.changes: list[str] = []
        """What a loaded checkpoint could not say for this growth."""
        self.begin(growth, seed)

    def begin(self, growth: ef.Growth, seed: int = 0) -> None:
        """All seeds dormant, under a growth that may have another capacity than before."""
        self.growth = growth
        with self._on_cpu():
            # Without adapters, whose random numbers would take long to compile: a birth writes
            # them.
            begin = jax.jit(lambda key: growth.init(key)._replace(adapters={}))
            state = begin(jax.random.key(seed))
            self._no_commands = growth.commands((), MIN_ROWS)
        self._state_packer = ArrayPacker(state)
        self._pack_state = jax.jit(self._state_packer.pack)
        self._unpack_state = jax.jit(self._state_packer.unpack)
        self._read = jax.jit(partial(_read, growth))
        self._programs: dict[int, _Program] = {}
        self._conclude = jax.jit(growth.external.apply_survey)
        self._on_trial = jax.jit(growth.external.seeds_to_ablate)
        self._unpacked: ef.GrowthState | None = None
        self.state = state

    @property
    def state(self) -> ef.GrowthState:
        """A `GrowthState` whose adapters are an empty dict: torch holds them."""
        if self._unpacked is None:
            with self._on_cpu():
                self._unpacked = self._unpack_state(self._packed)
        return self._unpacked

    @state.setter
    def state(self, state: ef.GrowthState) -> None:
        with self._on_cpu():
            self._packed = jax.device_put(self._pack_state(state), self.device)
            self._output = jax.tree.map(np.asarray, self._read(state))
        self._unpacked = state
        self.age += 1

    def __deepcopy__(self, memo: Any) -> Lifecycle:
        """Makes the lifecycle of a copied model, at the same point and independent from then on.

        States are never changed in place, so the two share what is the same.
        """
        twin = memo[id(self)] = copy.copy(self)
        twin.is_driven, twin.on_load, twin.make_room = False, _do_nothing, _do_nothing
        return twin

    def empty_adapters(self) -> Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]:
        """Zeros for every slot of every bank: site -> blueprint -> name -> `[P, ...]`."""
        with self._on_cpu():
            shapes = jax.eval_shape(self.growth.init, jax.random.key(0)).adapters
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)

    def _on_cpu(self) -> Any:
        return jax.default_device(self.device)

    def gains(self) -> np.ndarray:
        """float32[Q, 4]: the columns of `Gains` of every slot."""
        return np.asarray(self._output.gains)

    def owner(self) -> np.ndarray:
        """int32[Q]: the seed that holds each slot, or -1."""
        return np.asarray(self._output.owner)

    def stages(self) -> np.ndarray:
        """int8[S]."""
        return np.asarray(self._output.stage)

    def advance(
        self,
        statistics: np.ndarray,
        loss: float,
        drift: np.ndarray,
        has_broken: np.ndarray,
        commands: Sequence[Command],
    ) -> tuple[ef.StepInfo, list[tuple[int, Arrays]]]:
        """One step.

        Args:
          statistics: float32[S, K].
          loss: of the step.
          drift: float32[Q].
          has_broken: bool[Q].
          commands: from `esper_fn.commands`.

        Returns:
          What happened, with NumPy leaves, and the slots and parameters of newborn adapters.
        """
        before, rows = self._packed, self._pack(commands)
        size = rows.size
        if size not in self._programs:
            self._programs[size] = _Program(self.growth, self._state_packer)
        measured = np.concatenate([statistics.reshape(-1), [loss], drift, has_broken])
        # The state lies on the CPU device for good, so the program runs there.
        run = self._programs[size]
        self._packed, self._output = run(before, measured.astype(np.float32), rows)
        self._unpacked = None
        self.age += 1
        return self._output.info, self._newborns(before)

    def _pack(self, commands: Sequence[Command]) -> Any:
        """Commands as arrays of few sizes, as each size is compiled once."""
        if not commands:
            return self._no_commands
        size = MIN_ROWS
        while size < len(commands):
            size *= 4
        with self._on_cpu():
            return self.growth.commands(commands, size)

    def _newborns(self, before: Any) -> list[tuple[int, Arrays]]:
        slots = np.flatnonzero(self._output.is_born).tolist()
        if not slots:
            return []
        owner, newborns = self.owner(), []
        with self._on_cpu():
            old = self._unpack_state(before)
            impl = jax.random.key_impl(old.key)
            key = jax.random.wrap_key_data(jnp.asarray(self._output.key), impl=impl)
            for slot in slots:
                params = self.growth.external.newborn(key, slot, int(owner[slot]), old.directions)
                newborns.append((slot, jax.device_get(params)))
        return newborns

    def on_trial(self) -> list[int]:
        """The seeds whose contribution a survey measures now, -1 for a row without one."""
        with self._on_cpu():
            chosen, is_chosen = self._on_trial(self.state)
        return np.where(np.asarray(is_chosen), np.asarray(chosen), NONE).tolist()

    def conclude(
        self,
        moments: Sequence[Sequence[Any]],
        loss: float,
        chosen: Sequence[int],
        missing: Sequence[float],
    ) -> ef.SurveyInfo:
        """Takes in what a survey measured."""
        rows = np.asarray(chosen, np.int32)
        with self._on_cpu():
            state, info = self._conclude(
                self.state,
                list(moments),
                np.float32(loss),
                np.maximum(rows, 0),
                rows != NONE,
                np.asarray(missing, np.float32),
            )
        self.state = state
        return jax.device_get(info)

    def leaves(self) -> dict[str, np.ndarray]:
        """The state's arrays by their paths, its key as numbers."""
        return _saved.leaves_of(self.state._replace(key=jax.random.key_data(self.state.key)))

    def pack(self) -> bytes:
        """The state as bytes."""
        return _saved.write(_saved.describe(self.growth, self.leaves()))

    def unpack(self, packed: bytes) -> None:
        """Takes a packed state over.

        Raises:
          BridgeError: it cannot be read, or belongs to other sites, blueprints or more adapters.
        """
        saved = _saved.parse(packed)
        fitted = _saved.fit(saved, self.growth, self.leaves())
        if fitted.capacity or fitted.is_moved:
            raise BridgeError(
                f"the checkpoint holds more adapters than a part of the model has room for; say "
                f"grow(capacity={saved.capacity}), or load it into the whole model, which makes "
                "the room"
            )
        self._take(fitted)
        self.changes = fitted.changes
        self.on_load()

    def enlarge(self, growth: ef.Growth) -> None:
        """Goes on in a growth with more room, without telling."""
        before, age = _saved.describe(self.growth, self.leaves()), self.age
        self.begin(growth)
        self._take(_saved.fit(before, growth, self.leaves()))
        self.age = age

    def _take(self, fitted: _saved.Fitted) -> None:
        raw = self.state._replace(key=jax.random.key_data(self.state.key))
        leaves = [jax.device_put(leaf, self.device) for leaf in fitted.leaves]
        raw = jax.tree.unflatten(jax.tree.structure(raw), leaves)
        impl = jax.random.key_impl(self.state.key)
        with self._on_cpu():
            self.state = raw._replace(key=jax.random.wrap_key_data(raw.key, impl=impl))


def _read(growth: ef.Growth, state: ef.GrowthState) -> _Output:
    nobody = jnp.zeros(state.owner.shape, bool)
    return _Output(growth.external.gains(state), state.owner, state.seeds.stage, nobody)


def _advance(
    growth: ef.Growth, state: ef.GrowthState, measured: Any, commands: Any
) -> tuple[ef.GrowthState, _Output]:
    """One step. `measured`: the statistics of all seeds, the loss, drifts and failures of slots."""
    num_seeds, num_slots = growth.layout.num_seeds, growth.layout.num_slots
    end = num_seeds * len(Statistics._fields)
    statistics, (loss,), drift, broken = jnp.split(measured, [end, end + 1, end + 1 + num_slots])
    where = jnp.where(state.owner == NONE, num_seeds, state.owner)
    after, info, key = growth.external.advance(
        state,
        Statistics(*statistics.reshape(num_seeds, -1).T),
        loss,
        drift=jnp.zeros((num_seeds,), jnp.float32).at[where].set(drift, mode="drop"),
        has_broken=jnp.zeros((num_seeds,), bool).at[where].set(broken != 0, mode="drop"),
        commands=commands,
    )
    is_born = after.generation != state.generation
    return after, _read(growth, after)._replace(is_born=is_born, info=info, key=key)
