"""The lifecycle as the core's jitted functions on JAX's CPU device, with NumPy at its edges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import esper_fn as ef
from esper_fn._lattice import Moments, Reading, slot_gains
from esper_fn.commands import Command
from esper_fn.lifecycle import NONE
from torch_bridge._errors import BridgeError

Arrays = dict[str, np.ndarray]
MIN_ROWS = 4
"""Rows for commands in most steps."""


class Born(NamedTuple):
    """A newborn body."""

    slot: int
    leaves: Arrays


class Lifecycle:
    """The state of every seed, and the compiled functions that move it.

    `state` is a `GrowthState` whose bodies are an empty dict: torch holds them.
    """

    def __init__(self, growth: ef.Growth, seed: int) -> None:
        self.growth = growth
        self.device = jax.local_devices(backend="cpu")[0]
        with self._here():
            # Without bodies, whose random numbers would take long to compile: a birth writes them.
            begin = jax.jit(lambda key: growth.init(key)._replace(bodies={}))
            self.state = begin(jax.random.key(seed))
        self._advance = jax.jit(partial(_advance, growth))
        self._conclude = jax.jit(growth.conclude)
        self._on_trial = jax.jit(growth.on_trial)
        self.on_load: Callable[[], None] = lambda: None
        self._no_commands = growth.commands((), MIN_ROWS)
        self._gains = self._look()

    def __deepcopy__(self, memo: Any) -> Lifecycle:
        """A copied model (an average of its weights, say) is at the same point of the same life."""
        return self

    def empty_bodies(self) -> Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]:
        """Zeros for every slot of every bank: site -> blueprint -> name -> `[P, ...]`."""
        shapes = jax.eval_shape(self.growth.init, jax.random.key(0)).bodies
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)

    def _here(self) -> Any:
        return jax.default_device(self.device)

    def gains(self) -> np.ndarray:
        """float32[Q, 3]: act, learn and feel of every slot."""
        return self._gains

    def _look(self) -> np.ndarray:
        state = self.state
        with self._here():
            return np.asarray(_gains(state.seeds, state.owner, state.settings))

    def owner(self) -> np.ndarray:
        """int32[Q]: the seed that holds each slot, or -1."""
        return np.asarray(self.state.owner)

    def stages(self) -> np.ndarray:
        """int8[S]."""
        return np.asarray(self.state.seeds.stage)

    def advance(
        self,
        readings: np.ndarray,
        loss: float,
        drift: np.ndarray,
        has_broken: np.ndarray,
        commands: Sequence[Command],
    ) -> tuple[ef.Info, list[Born]]:
        """One step.

        Args:
          readings: float32[S, K].
          loss: of the step.
          drift: float32[Q].
          has_broken: bool[Q].
          commands: what is asked.

        Returns:
          What happened, with NumPy leaves, and the bodies to put into place.
        """
        before = self.state
        packed = self._pack(commands)
        with self._here():
            self.state, info, key, gains = self._advance(
                before, readings, np.float32(loss), drift, has_broken, packed
            )
            self._gains = np.asarray(gains)
            born = self._born(before, key)
        return jax.tree.map(np.asarray, info), born

    def _pack(self, commands: Sequence[Command]) -> Any:
        """Commands as arrays of few sizes, as each size is compiled once."""
        if not commands:
            return self._no_commands
        size = MIN_ROWS
        while size < len(commands):
            size *= 4
        with self._here():
            return self.growth.commands(commands, size)

    def _born(self, before: ef.GrowthState, key: Any) -> list[Born]:
        slots = np.flatnonzero(np.asarray(self.state.is_born))
        owner = self.owner()
        found = []
        for slot in slots.tolist():
            params = self.growth.newborn(key, slot, int(owner[slot]), before.memory)
            found.append(Born(slot=slot, leaves=jax.device_get(params)))
        return found

    def on_trial(self) -> list[int]:
        """The seeds whose contribution a survey measures now, -1 for a row without one."""
        with self._here():
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
        with self._here():
            self.state, info = self._conclude(
                self.state,
                [Moments(*of) for of in moments],
                np.float32(loss),
                np.maximum(rows, 0),
                rows != NONE,
                np.asarray(missing, np.float32),
            )
        return jax.device_get(info)

    # --- in a state dict ---------------------------------------------------------------------

    def _leaves(self) -> tuple[list[Any], Any]:
        raw = self.state._replace(key=jax.random.key_data(self.state.key))
        return jax.tree.flatten(raw)

    def _digest(self, leaves: Sequence[Any]) -> bytes:
        lattice = self.growth.lattice
        told = [
            [(np.shape(leaf), str(np.asarray(leaf).dtype)) for leaf in leaves],
            [(s.name, s.features, s.chunks, s.topology) for s in lattice.sites],
            lattice.names,
            lattice.capacity,
        ]
        return hashlib.sha256(repr(told).encode()).digest()[:8]

    def pack(self) -> Tensor:
        """The state as one uint8 tensor: eight bytes that name its layout, then its arrays."""
        leaves = [np.asarray(leaf) for leaf in self._leaves()[0]]
        data = self._digest(leaves) + b"".join(leaf.tobytes() for leaf in leaves)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def unpack(self, packed: Tensor) -> None:
        """Takes a packed state over.

        Raises:
          BridgeError: it belongs to other sites, blueprints, policies or another capacity.
        """
        leaves, structure = self._leaves()
        data = packed.detach().cpu().numpy().tobytes()
        sizes = [np.asarray(leaf).nbytes for leaf in leaves]
        if len(data) != 8 + sum(sizes) or data[:8] != self._digest(leaves):
            raise BridgeError(
                "the checkpoint's lifecycle belongs to another growth: grow the model with the "
                "same targets, chunks, blueprints, capacity, policy and settings as when it was "
                "saved, then load"
            )
        found, at = [], 8
        for leaf, size in zip(leaves, sizes, strict=True):
            like = np.asarray(leaf)
            part = np.frombuffer(data[at : at + size], like.dtype).reshape(like.shape)
            found.append(jax.device_put(part, self.device))
            at += size
        raw = jax.tree.unflatten(structure, found)
        with self._here():
            self.state = raw._replace(key=jax.random.wrap_key_data(raw.key))
        self._gains = self._look()
        self.on_load()


_gains = jax.jit(slot_gains)


def _advance(
    growth: ef.Growth,
    state: ef.GrowthState,
    readings: Any,
    loss: Any,
    drift: Any,
    has_broken: Any,
    commands: Any,
) -> Any:
    num_seeds = growth.lattice.num_seeds
    where = jnp.where(state.owner == NONE, num_seeds, state.owner)
    after, info, key = growth.advance(
        state,
        Reading(*(readings[:, k] for k in range(readings.shape[1]))),
        loss,
        drift=jnp.zeros((num_seeds,), jnp.float32).at[where].set(drift, mode="drop"),
        has_broken=jnp.zeros((num_seeds,), bool).at[where].set(has_broken, mode="drop"),
        commands=commands,
    )
    return after, info, key, slot_gains(after.seeds, after.owner, after.settings)
