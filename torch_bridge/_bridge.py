"""A grown torch model: one call a training step, and one a survey."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import esper_fn as ef
from esper_fn.commands import Command
from esper_fn.lifecycle import Stage
from esper_fn.types import Layout
from esper_kernels import Gains
from torch_bridge import _survey, _unwrap
from torch_bridge._arguments import check_step, check_survey
from torch_bridge._banks import banks_of, update_learning, update_plans
from torch_bridge._distributed import Group
from torch_bridge._errors import BridgeError
from torch_bridge._measure import Measured, measure, read
from torch_bridge._optim import Watcher
from torch_bridge._plan import BankSlots
from torch_bridge._reach import Reach
from torch_bridge._shared import Shared
from torch_bridge._site import Seeds


class Bridge:
    """A model that grows; made by `grow`.

    Args:
      model: the model, changed in place.
      sites: the seeds of every target.
      shared: what they share, with the state of every seed.
      group: the ranks that decide together.
      hooks: what `grow` has registered with the model.
      watch_every: steps between two measurements of dormant chunks; 0 for none.
      lag: steps by which the lifecycle follows.

    Attributes:
      model: the model.
      sites: the seeds of every target, in the order of their numbers.
      optimizers: what watches the optimisers.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Seeds],
        shared: Shared,
        group: Group,
        hooks: Sequence[RemovableHandle],
        watch_every: int,
        lag: int,
    ) -> None:
        self.model = model
        self.sites = list(sites)
        self._shared, self._lifecycle = shared, shared.lifecycle
        self._group = group
        self._watch_every = watch_every
        self._hooks = list(hooks)
        adapters = self.adapter_parameters()
        known = {id(p) for p in adapters}
        host = [p for p in model.parameters() if id(p) not in known]
        self.optimizers = Watcher(host, adapters)
        self._host = host
        self._num_steps = 0
        self._num_calls = 0
        self._lag = lag
        self._pending: list[Measured] = []
        self._commands: list[Command] = []
        self._reach = Reach(sites, watch_every)
        self._is_open = True
        self._last_plan: tuple[bytes, bytes] | None = None
        self._drive()

    def _drive(self) -> None:
        lifecycle = self._lifecycle
        lifecycle.is_driven = True
        lifecycle.on_load, lifecycle.make_room = self._loaded, self._make_room
        self._last_plan = None
        self._refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> Bridge:
        """The bridge of the copied model, which grows on from here by itself.

        It knows no optimiser yet, and no measurement that is still under way.
        """
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        for name, value in vars(self).items():
            if name == "_group":
                twin._group = value
            elif name not in ("optimizers", "_pending", "_commands", "_last_plan"):
                setattr(twin, name, copy.deepcopy(value, memo))
        twin.optimizers = Watcher(twin._host, twin.adapter_parameters())
        twin._pending, twin._commands = [], list(self._commands)
        if twin._is_open:
            twin._drive()
        else:
            twin.optimizers.close()
        return twin

    @property
    def growth(self) -> ef.Growth:
        """The static part."""
        return self._lifecycle.growth

    @property
    def state(self) -> ef.GrowthState:
        """The lifecycle's state, on JAX's CPU device; its adapters are in the model."""
        return self._lifecycle.state

    @property
    def layout(self) -> Layout:
        """Sites, blueprints and capacity."""
        return self.growth.layout

    @property
    def stages(self) -> np.ndarray:
        """int8[S]: the stage of every seed."""
        return self._lifecycle.stages()

    @property
    def num_live(self) -> int:
        """Adapters at work in the next step."""
        return int(np.any(self._lifecycle.gains() != 0, axis=1).sum())

    def seed(self, index: int) -> ef.lifecycle.Seed:
        """The values of one seed, by its number."""
        return self.growth.seed(self.state, index)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of all adapters, alive or not."""
        return [p for site in self.sites for p in site.parameters()]

    def parameter_groups(
        self, host: dict[str, Any] | None = None, adapters: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser, with options of their own for the host and for the adapters."""
        grown = self.adapter_parameters()
        known = {id(p) for p in grown}
        # Not `_host`: `fully_shard` puts other parameters in their places.
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        return [
            *([{"params": rest, **(host or {})}] if rest else []),
            {"params": grown, **(adapters or {})},
        ]

    def summary(self) -> str:
        """Sites, parameters and stages as text, as `grow` prints them."""
        layout = self.layout
        own = sum(p.numel() for p in self.adapter_parameters())
        host = sum(p.numel() for p in self._host)
        stages = np.bincount(self.stages, minlength=len(Stage))
        lines = [
            f"{layout.num_seeds:,} seeds at {len(self.sites)} sites of {type(self.model).__name__}"
            f" ({host:,} parameters), room for {layout.num_slots:,} adapters "
            f"({own:,} parameters)"
        ]
        width = max(len(site.site) for site in self.sites)
        for site in self.sites[:_MOST_LINES]:
            chunking = site.plan.chunking
            names = ", ".join(bank.name for bank in site.bank_slots)
            lines.append(
                f"  {site.site:<{width}}  {chunking.features} features in "
                f"{chunking.chunks} chunks, {site.plan.topology}: {names}"
            )
        if len(self.sites) > _MOST_LINES:
            lines.append(f"  and {len(self.sites) - _MOST_LINES} more")
        lines.append(
            "  " + ", ".join(f"{n:,} {Stage(k).name}" for k, n in enumerate(stages.tolist()) if n)
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Bridge: {self.summary()}>"

    def attach(self, optimizer: Any, scaler: Any = None) -> None:
        """Checks an optimiser now rather than at its first step, and says what scales the loss.

        Optimisers need not be attached: the bridge notices every step of a `torch.optim.Optimizer`.

        Args:
          optimizer: one that holds adapters, or a list of those that share them.
          scaler: a `torch.amp.GradScaler` whose factor is taken out of what the steps measure.

        Raises:
          BridgeError: no optimiser seen so far holds all adapters.
        """
        for each in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
            self.optimizers.check(each)
        self.optimizers.check_complete()
        if scaler is not None:
            self.optimizers.scaler = scaler
            self.optimizers.scale = self.optimizers.scale_now()
            self._refresh()

    @contextmanager
    def around(self, optimizer: Any) -> Iterator[None]:
        """Watches one step of an optimiser that is no `torch.optim.Optimizer`.

        Args:
          optimizer: it has `param_groups` and `state` of torch's form.
        """
        self.optimizers.before_step(optimizer)
        yield
        self.optimizers.after_step(optimizer)

    def step(self, loss: Tensor | float, commands: Sequence[Command] = ()) -> ef.StepInfo | None:
        """Advances every seed by one step; call it after `optimizer.step()`.

        It reads in one transfer what the backward passes measured since the last call, advances the
        lifecycle on the CPU, gives newborns their parameters and a fresh optimiser state, and keeps
        adapters that do not learn out of the next optimiser step. In a process group it adds up the
        measurements of all ranks, so every rank decides the same.

        Args:
          loss: the training loss, the mean over what this rank saw.
          commands: from `esper_fn.commands`.

        Returns:
          What happened, with NumPy leaves. With `lag`, what the step that many calls ago led to;
          None before there was one, and commands wait.

        Raises:
          BridgeError: an argument has another type, an adapter requires no gradient or is in no
            optimiser that steps, or the bridge was unwrapped.
        """
        self._check_open()
        check_step(loss, commands)
        self.optimizers.check_gradients(with_resting=not self._num_calls)
        self.optimizers.check_complete()
        self._pending.append(
            measure(self.sites, self.optimizers, self._group, loss, is_waiting=not self._lag)
        )
        self._commands += commands
        if len(self._pending) <= self._lag:
            self._end_step()
            return None
        measured = read(self._pending.pop(0), self._group, self.layout)
        self._reach.note(measured[0])
        self._warn_of_changes()
        pending, self._commands = self._commands, []
        info, newborns = self._lifecycle.advance(*measured, pending)
        with torch.no_grad():
            for slot, leaves in newborns:
                self._write_newborn(slot, leaves)
        self._end_step()
        return info

    def _warn_of_changes(self) -> None:
        changes, self._lifecycle.changes = self._lifecycle.changes, []
        if changes:
            warnings.warn(
                f"the checkpoint was saved under another {', '.join(changes)}: stages and adapters "
                "go on, these begin anew; grow with the same ones to go on as before",
                stacklevel=3,
            )

    def _end_step(self) -> None:
        self.optimizers.end_step()
        self._num_steps += 1
        self._num_calls += 1
        self._refresh()

    def _write_newborn(self, slot: int, leaves: dict[str, np.ndarray]) -> None:
        site, bank = self._bank_of(slot)
        local = slot - bank.start
        params = site.parameters_of(bank.name, (local,))
        numbers = {name: torch.tensor(leaf) for name, leaf in leaves.items()}
        site.write_(bank.name, local, numbers)
        self._shared.begin_averages(site, bank.name, local, slot, numbers)
        self.optimizers.forget(params, local if site.is_stacked else None)

    def _bank_of(self, slot: int) -> tuple[Seeds, BankSlots]:
        banks = banks_of(self.sites)
        return next((site, bank) for site, bank in banks if bank.start <= slot < bank.slots.stop)

    def _refresh(self) -> None:
        """Updates the plan of every site, and what optimisers may move."""
        gains, owner = self._lifecycle.gains(), self._lifecycle.owner()
        if Gains.from_columns(gains).output_damping.any():
            # Damping is in units of the mean loss over all ranks, and of it unscaled.
            factor = self.optimizers.scale_now() * self._group.size
            gains = gains * np.array(Gains(1, 1, 1, factor), np.float32)
        watching = bool(self._watch_every) and self._num_steps % self._watch_every == 0
        is_new = not self._num_calls  # the first step compiles what later ones with work to do run
        self._shared.is_busy = watching or is_new or bool(np.any(gains != 0))
        before, self._last_plan = self._last_plan, (gains.tobytes(), owner.tobytes())
        if before == self._last_plan:
            for site in self.sites:
                if site.plan.is_watching != watching:
                    site.plan = replace(site.plan, is_watching=watching)
            return
        update_plans(self.sites, gains, owner, is_watching=watching)
        update_learning(self.optimizers, self.sites, gains)

    def _make_room(self, capacity: int) -> None:
        """Room for as many adapters as a checkpoint holds."""
        self._shared.make_room(capacity)
        self.optimizers.set_adapters(self.adapter_parameters())
        self._loaded()

    def _loaded(self) -> None:
        self._num_steps = int(self._lifecycle.state.step)
        self._last_plan = None
        self.optimizers.before = None
        self._pending.clear()
        self._refresh()

    def survey(self, closure: Callable[[], Tensor]) -> ef.SurveyInfo:
        """Measures where growth would pay and what living seeds are worth.

        Args:
          closure: runs the model on held-out data and returns the loss; deterministic. It is
            called once with gradients and once for each seed under trial, at most
            `max_ablations` times, without. No `.grad` is touched. A model inside
            `DistributedDataParallel` is called as `ddp.module` here.

        Returns:
          What was found, with NumPy leaves; `bridge.state` remembers it.

        Raises:
          BridgeError: `closure` is no function or returns no scalar, or the bridge was unwrapped.
        """
        self._check_open()
        check_survey(closure)
        return _survey.survey(self.sites, self._shared, self._group, closure)

    def unwrap(self) -> nn.Module:
        """Takes the seeds out of the model, whose outputs stay the same.

        Adapters that act and are linear in the output of a linear layer, a convolution, an
        embedding or an affine normalisation are folded into its weights, if these are ordinary
        parameters that nothing else reads; others stay, as a plain submodule `grown` of their
        target. So do adapters behind a hook, and those too small for weights of 16 bits.

        Returns:
          The model. The bridge ends here.

        Raises:
          BridgeError: the bridge was unwrapped already.
        """
        self._check_open()
        staying = _unwrap.unwrap(self.model, self.sites)
        self._is_open = False
        for hook in self._hooks:
            if hook.id not in staying:
                hook.remove()
        self.optimizers.close()
        return self.model

    def _check_open(self) -> None:
        if not self._is_open:
            raise BridgeError("this bridge was unwrapped; grow the model again for another one")


_MOST_LINES = 12
