"""Joins a training loop and the bus: commands between steps, outcomes and reports after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from esper_fn import bus, checkpoint, commands
from esper_fn._growth import Growth
from esper_fn.bus import Outcome, SeedOutcome
from esper_fn.bus._consumer import InFlight
from esper_fn.bus._worker import Worker
from esper_fn.commands import Code
from esper_fn.commands._pack import pack_on_host
from esper_fn.errors import EsperError, RunStoppedError
from esper_fn.runtime._messages import REFUSALS, Reporter, stage_name, to_core
from esper_fn.runtime._positions import SavedPositions
from esper_fn.runtime._records import Segment
from esper_fn.runtime._saving import Checkpoints

_NOTE = "bus_position"
_MAX_DEFERRED = 1_024
_HANDOVER_SECONDS = 0.002
"""A loop waits at most so long until its outcomes are on their way."""
_PAUSE_SECONDS = 0.1
"""A paused loop checks so often whether it should end."""


_Translated = list[commands.Command]
_Translation = tuple[InFlight, _Translated]
"""A command of the bus, and what it is as commands of the core."""


class Steering:
    """Lets a run be steered and watched over a bus, as `fit(..., steering=...)`.

    Between two segments it takes commands. It stops, pauses and saves there; commands to seeds are
    applied in the next segment. With `segment_steps=1` every step is a segment, and commands to
    seeds are still taken once the gradients of the step are there. After a segment it answers
    first, before other results of the segment go to the host. It never waits for a server, which a
    thread of the worker talks to.

    Open it as a context around `fit`. `steer` makes one.

    Args:
      growth: the static part of the run.
      make_worker: makes the worker, for a restored position or for None.
      max_commands: most commands in a segment; `fit` packs as many.
      frames_per_second: most reports of the state of all seeds in a second.
    """

    def __init__(
        self,
        growth: Growth,
        make_worker: Callable[[bus.RunPosition | None], Worker],
        *,
        max_commands: int = 16,
        frames_per_second: float = 10.0,
    ) -> None:
        self._growth = growth
        self._grafts = [graft.name for graft in growth.grafts]
        self._make_worker = make_worker
        self._reporter = Reporter(frames_per_second=frames_per_second)
        self.max_commands = max_commands
        self._next: list[_Translation] | None = None
        """Commands for the next segment; None if the inbox was not looked at."""
        self._running: list[_Translation] = []
        self._deferred: list[InFlight] = []
        """Commands to seeds that wait for the end of a pause."""
        self._stop: bus.Stop | None = None
        self._is_paused = False
        self._is_save_due = False
        self._saved: SavedPositions | None = None
        self._step = 0
        self._should_end: Callable[[], bool] = lambda: False
        self.worker: Worker = make_worker(None)

    def __enter__(self) -> Steering:
        self.worker.start(is_listening=False)  # a restored run takes commands as itself only
        return self

    def __exit__(self, *error: object) -> None:
        self.worker.close()

    def commands(self, step: int) -> list[commands.Command]:
        """Returns the commands of the segment that begins with a step.

        Raises:
          FencedError: another process drives the run now.
          RunStoppedError: the run was stopped before its first step.
        """
        self._step = step
        if self._next is None and self.should_stop():
            self.check_stopped()
        self._take(only_seeds=True)
        self._running, self._next = self._next or [], None
        return [command for _, translated in self._running for command in translated]

    def answer(self, step: int, fetch: Callable[[], Any]) -> None:
        """Answers the commands of the segment that began with a step.

        Args:
          step: first step of the segment.
          fetch: brings the segment's `Outcomes` to the host; called only if there were commands.
        """
        if not self._running:
            return
        outcomes, first = fetch(), 0
        for item, translated in self._running:
            self._answer(item, translated, outcomes, first, step)
            first += len(translated)
        self._running = []
        self.worker.flush(_HANDOVER_SECONDS)

    def listener(self, segment: Segment) -> None:
        """Reports a segment."""
        if segment.infos is None:
            return
        self._step = segment.first_step + segment.num_steps
        worker = self.worker
        worker.progress.step = self._step
        worker.flush()
        # The I/O thread makes the messages, so the next step does not wait for them.
        messages = self._reporter.report(segment)
        worker.offer([lambda: messages(worker.num_dropped)])
        step = None if self._saved is None else self._saved.newly_saved()
        if self._saved is not None and step is not None:
            worker.offer([bus.CheckpointEvent(step=step, what="saved")])
            if (cursor := self._saved.oldest()) is not None:
                worker.trim(cursor)

    def stop_condition(self, should_stop: Callable[[], bool] | None) -> Callable[[], bool]:
        """Combines `should_stop` of `fit` with stops over the bus. Either one ends a pause."""
        if should_stop is not None:
            self._should_end = should_stop
        return lambda: self.should_stop() or self._should_end()

    def should_start(self) -> bool:
        """Processes the inbox before the first step; False if the run should end without one.

        Raises:
          FencedError: another process drives the run now.
          RunStoppedError: the run was stopped before its first step.
        """
        if self.should_stop():
            self.check_stopped()
        return not (self._is_paused and self._should_end())

    def should_stop(self) -> bool:
        """Processes the inbox, and returns whether the run was stopped; blocks during a pause.

        Raises:
          FencedError: another process drives the run now.
        """
        self.worker.listen()
        self._next = self._next or []
        self._take()
        while self._is_paused and self._stop is None and not self._should_end():
            self.worker.wait(_PAUSE_SECONDS)
            self._take()
        return self._stop is not None

    def should_save(self) -> bool:
        """Whether a command has asked for a checkpoint since the last call."""
        is_due, self._is_save_due = self._is_save_due, False
        return is_due

    def with_position(self, checkpoints: Checkpoints | None) -> Checkpoints | None:
        """Extends checkpoints by the run's position on the bus, in their note.

        From now on, commands stay on the server until no checkpoint is left that precedes them.
        """
        if checkpoints is None:
            self._saved = None
            self.worker.listen()
            return None
        saved = self._saved = SavedPositions(checkpoints.writer)
        self.worker.keeps_commands = True
        if not checkpoint.steps(checkpoints.writer.path):
            self.worker.listen()  # nothing is restored; else the restored worker listens
        note, recall = checkpoints.note, checkpoints.recall

        def save_position() -> dict[str, Any]:
            inner = None if note is None else note()
            position = self.worker.position()
            saved.add(self._step, position)
            return {"note": inner, _NOTE: position.as_dict()}

        def restore_position(value: Any) -> None:
            if isinstance(value, dict) and _NOTE in value:
                position = bus.RunPosition.from_dict(value[_NOTE])
                self._restart(position)
                event = bus.CheckpointEvent(step=saved.restore(position), what="restored")
                self.worker.offer([event])
                value = value["note"]
            if recall is not None:
                recall(value)

        return replace(checkpoints, note=save_position, recall=restore_position)

    def checkpoint_failed(self, error: BaseException) -> None:
        """Reports a checkpoint that could not be written; for `on_failure` of a writer."""
        event = bus.CheckpointEvent(step=self._step, what="failed", text=str(error)[:2_000])
        self.worker.offer([event])

    def check_stopped(self) -> None:
        """Raises `RunStoppedError` if the run was stopped over the bus, with who and why."""
        if self._stop is not None:
            raise RunStoppedError(
                f"stopped before step {self._step} by {self._stop.sender or 'a command'}"
                + (f": {self._stop.reason}" if self._stop.reason else "")
            )

    @property
    def is_stopped(self) -> bool:
        """Whether the run was stopped over the bus."""
        return self._stop is not None

    def _restart(self, position: bus.RunPosition) -> None:
        self.worker.close()
        self.worker = self._make_worker(position)
        self.worker.keeps_commands = True
        self.worker.start()

    def _take(self, *, only_seeds: bool = False) -> None:
        """Takes commands until none waits, or one does not fit into this segment."""
        if not self.worker.has_news and not self._deferred:
            return
        translations = self._next or []
        seeds = [command.seed for _, translated in translations for command in translated]
        items: list[InFlight] = []
        if not self._is_paused:
            items, self._deferred = self._deferred, []
        items += self.worker.take(self._step, self.max_commands)
        for index, item in enumerate(items):
            command = item.command
            if not isinstance(command, bus.SeedCommand | bus.Batch):
                if only_seeds or (isinstance(command, bus.Pause) and translations):
                    # Commands before a pause are applied in the step before it.
                    self.worker.put_back(items[index:])
                    break
                self._control(item)
                continue
            if self._is_paused:
                if len(self._deferred) < _MAX_DEFERRED:
                    self._deferred.append(item)
                else:
                    text = f"paused, and {_MAX_DEFERRED} commands wait; resume it"
                    self._finish(item, "REFUSED", text)
                continue
            translated = self._translate(item)
            if translated is None:
                continue
            own = [command.seed for command in translated]
            if len(seeds) + len(own) > self.max_commands or set(own) & set(seeds):
                self.worker.put_back(items[index:])
                break
            translations.append((item, translated))
            seeds += own
        self._next = translations
        self.worker.flush()

    def _control(self, item: InFlight) -> None:
        """Carries out a command to the run."""
        match item.command:
            case bus.Pause() | bus.Resume() as command:
                self._is_paused = isinstance(command, bus.Pause)
                self.worker.progress.is_paused = self._is_paused
                answer = "DONE", f"before step {self._step}"
            case bus.Stop() as command:
                self._stop = command
                answer = "DONE", f"stopped before step {self._step}"
            case bus.Checkpoint() if self._saved is not None:
                self._is_save_due = True
                answer = "DONE", "will be saved at the next step boundary"
            case bus.Checkpoint():
                answer = "REFUSED", "the run keeps no checkpoints; start it with them"
            case command:
                answer = "REFUSED", f"{type(command).__name__} is no command to a run"
        self._finish(item, *answer)

    def _translate(self, item: InFlight) -> _Translated | None:
        """Translates a command to seeds; refuses it and returns None if that is not possible."""
        command = item.command
        parts = command.commands if isinstance(command, bus.Batch) else (command,)
        if len(parts) > self.max_commands:
            text = f"{len(parts)} commands in a batch; this run takes {self.max_commands} a step"
            self._finish(item, "REFUSED", text)
            return None
        try:
            translated = [to_core(self._growth, part) for part in parts]
            if len({each.seed for each in translated}) < len(translated):
                raise ValueError("a batch names a seed twice; send the second command after it")
            if isinstance(command, bus.Batch):
                translated = commands.batch(translated, command.id)
            # It knows every name; what it refuses must not reach the loop.
            pack_on_host(self._growth.layout, self._grafts, translated, self.max_commands)
        except (EsperError, ValueError) as error:
            self._finish(item, "REFUSED", str(error))
            return None
        return translated

    def _answer(
        self, item: InFlight, translated: _Translated, outcomes: Any, first: int, step: int
    ) -> None:
        """Answers a command whose rows in the outcomes of a segment begin at `first`."""
        seeds = tuple(
            SeedOutcome(
                seed=command.seed,
                code=Code(int(outcomes.code[0, row])).name,
                before=stage_name(outcomes.before[0, row]),
                after=stage_name(outcomes.after[0, row]),
            )
            for row, command in enumerate(translated, first)
        )
        bad = [Code[seed.code] for seed in seeds if seed.code != Code.DONE.name]
        # The cause, before its consequences.
        causes = [code for code in bad if code is not Code.BATCH_REFUSED]
        code = (causes or bad or [Code.DONE])[0]
        outcome = Outcome(
            command_id=item.command.id,
            code=code.name,
            text=REFUSALS.get(code, ""),
            step=step,
            seeds=seeds,
        )
        self.worker.finish(item, outcome)

    def _finish(self, item: InFlight, code: str, text: str) -> None:
        outcome = Outcome(command_id=item.command.id, code=code, text=text[:2_000], step=self._step)
        self.worker.finish(item, outcome)
