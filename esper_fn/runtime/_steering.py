"""Where a running loop and the bus meet: commands in between steps, words out after them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

from esper_fn import bus, checkpoint, commands
from esper_fn._growth import Growth
from esper_fn.bus import Outcome, SeedOutcome, Taken
from esper_fn.commands import Code
from esper_fn.errors import EsperError, RunStoppedError
from esper_fn.runtime._positions import SavedPositions
from esper_fn.runtime._records import Segment
from esper_fn.runtime._saving import Checkpoints
from esper_fn.runtime._telling import Teller
from esper_fn.runtime._translate import WORDS, stage_name, to_core

_NOTE = "bus_position"
_MAX_DEFERRED = 1_024
_HANDING_OVER = 0.002
"""Seconds that a loop waits at most for its outcomes to be on their way."""
_PAUSE_SECONDS = 0.1
"""So often a paused loop asks whether it is to end."""


class _Rows(NamedTuple):
    """A command of the bus as rows of the core."""

    taken: Taken
    commands: list[commands.Command]


class Steering:
    """Lets a run be steered and watched over a bus, as `fit(..., steering=...)`.

    Between two segments it takes what waits: stops, pauses and saves are done there, commands to
    seeds become rows of the next segment. With `segment_steps=1` every step is such a boundary, and
    rows are still taken when the gradients of the step are there. After a segment it answers,
    before anything else of the segment goes to the host, and without waiting for a server, which a
    thread of the station talks to.

    Use it as a context around `fit`. Make one with `steer`.

    Args:
      growth: the static part of the run.
      station: made for a position, or for none.
      max_commands: rows of a segment; also what `fit` packs.
      frames_per_second: of the columns of all seeds, at most.
      clock: seconds, rising.
    """

    def __init__(
        self,
        growth: Growth,
        station: Callable[[bus.RunPosition | None], bus.Station],
        *,
        max_commands: int = 16,
        frames_per_second: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._growth = growth
        self._grafts = [graft.name for graft in growth.grafts]
        self._make = station
        self._teller = Teller(frames_per_second=frames_per_second, clock=clock)
        self.max_commands = max_commands
        self._rows: list[_Rows] | None = None
        self._running: list[_Rows] = []
        self._deferred: list[Taken] = []
        self._stopped_by: bus.Stop | None = None
        self._is_paused = False
        self._should_save = False
        self._saved: SavedPositions | None = None
        self._step = 0
        self._should_end: Callable[[], bool] = lambda: False
        self.station: bus.Station = station(None)

    def __enter__(self) -> Steering:
        self.station.start(is_listening=False)  # a restored run takes commands as itself only
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.station.close()

    # --- what `fit` calls -----------------------------------------------------------------------

    def commands(self, step: int) -> list[commands.Command]:
        """The rows of the segment that begins with a step, up to now.

        Raises:
          FencedError: another process drives the run now.
          RunStoppedError: stopped before its first step.
        """
        self._step = step
        if self._rows is None and self._boundary():
            self.check_stopped()
        self._fill(only_seeds=True)
        self._running, self._rows = self._rows or [], None
        return [row for rows in self._running for row in rows.commands]

    def answer(self, step: int, outcomes: Callable[[], Any]) -> None:
        """Answers the commands of the segment that began with a step.

        Args:
          step: its first.
          outcomes: brings the segment's `Outcomes` to the host; called where there are commands.
        """
        if not self._running:
            return
        found, at = outcomes(), 0
        for rows in self._running:
            count = len(rows.commands)
            self._answer(rows, found, at, count, step)
            at += count
        self._running = []
        self.station.flush(_HANDING_OVER)

    def listener(self, segment: Segment) -> None:
        """Tells of a segment."""
        if segment.infos is None:
            return
        self._step = segment.first_step + segment.num_steps
        self.station.set_step(self._step)
        self.station.flush()
        self._tell(segment)

    def heed(self, should_stop: Callable[[], bool] | None) -> Callable[[], bool]:
        """What `fit` asks after each segment: somebody else's wish to end, and `should_stop`.

        A pause ends with either.
        """
        if should_stop is not None:
            self._should_end = should_stop
        return lambda: self.should_stop() or self._should_end()

    def should_start(self) -> bool:
        """Takes what waits before the first step; False where a pause ended with a wish to end.

        Raises:
          FencedError: another process drives the run now.
          RunStoppedError: stopped before its first step.
        """
        if self._boundary():
            self.check_stopped()
        return not (self._is_paused and self._should_end())

    def should_stop(self) -> bool:
        """Takes what waits; stands still while paused; True after a stop.

        Raises:
          FencedError: another process drives the run now.
        """
        return self._boundary()

    def should_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._should_save = self._should_save, False
        return asked

    def join(self, checkpoints: Checkpoints | None) -> Checkpoints | None:
        """Checkpoints that keep the run's position on the bus in their note.

        Commands stay on the server from now on until no checkpoint is left that came before them.
        """
        if checkpoints is None:
            self._saved = None
            self.station.listen()
            return None
        saved = self._saved = SavedPositions(checkpoints.writer)
        self.station.keep_commands()
        if not checkpoint.steps(checkpoints.writer.path):
            self.station.listen()  # nothing is restored; else the restored position listens
        note, recall = checkpoints.note, checkpoints.recall

        def with_position() -> dict[str, Any]:
            inner = None if note is None else note()
            position = self.station.position()
            saved.note(self._step, position)
            return {"note": inner, _NOTE: position.as_dict()}

        def from_position(told: Any) -> None:
            if isinstance(told, dict) and _NOTE in told:
                position = bus.RunPosition.from_dict(told[_NOTE])
                self._restart(position)
                self.station.offer(
                    [bus.CheckpointEvent(step=saved.restored(position), what="restored")]
                )
                told = told["note"]
            if recall is not None:
                recall(told)

        return replace(checkpoints, note=with_position, recall=from_position)

    def checkpoint_failed(self, error: BaseException) -> None:
        """Tells of a checkpoint that was not written; for a writer's `on_failure`."""
        event = bus.CheckpointEvent(step=self._step, what="failed", words=str(error)[:2_000])
        self.station.offer([event])

    def check_stopped(self) -> None:
        """Raises after a stop.

        Raises:
          RunStoppedError: with who and why.
        """
        if self._stopped_by is not None:
            by = self._stopped_by
            raise RunStoppedError(
                f"stopped before step {self._step} by {by.sender or 'a command'}"
                + (f": {by.reason}" if by.reason else "")
            )

    @property
    def is_stopped(self) -> bool:
        """Whether a stop is in force."""
        return self._stopped_by is not None

    # --- parts ---------------------------------------------------------------------------------

    def _restart(self, position: bus.RunPosition) -> None:
        self.station.close()
        self.station = self._make(position)
        self.station.keep_commands()
        self.station.start()

    def _boundary(self) -> bool:
        self.station.listen()
        self._rows = self._rows or []
        self._fill()
        while self._is_paused and self._stopped_by is None and not self._should_end():
            self.station.wait(_PAUSE_SECONDS)
            self._fill()
        return self._stopped_by is not None

    def _fill(self, *, only_seeds: bool = False) -> None:
        """Takes commands until none waits, or one does not fit into this segment."""
        if not self.station.has_news and not self._deferred:
            return
        rows = self._rows or []
        num_rows = sum(len(row.commands) for row in rows)
        seeds = {row.seed for one in rows for row in one.commands}
        waiting: list[Taken] = []
        if not self._is_paused:
            waiting, self._deferred = self._deferred, []
        waiting += self.station.take(self._step, self.max_commands)
        for at, taken in enumerate(waiting):
            command = taken.command
            if not isinstance(command, bus.SeedCommand | bus.Batch):
                if only_seeds or (isinstance(command, bus.Pause) and rows):
                    # What came before a pause takes force in the step before it stands still.
                    self.station.put_back(waiting[at:])
                    break
                self._control(taken)
                continue
            if self._is_paused:
                self._defer(taken)
                continue
            found = self._translate(taken)
            if found is None:
                continue
            asked = {row.seed for row in found.commands}
            if num_rows + len(found.commands) > self.max_commands or asked & seeds:
                self.station.put_back(waiting[at:])
                break
            rows.append(found)
            num_rows += len(found.commands)
            seeds |= asked
        self._rows = rows
        self.station.flush()

    def _control(self, taken: Taken) -> None:
        command = taken.command
        if isinstance(command, bus.Pause | bus.Resume):
            self._is_paused = isinstance(command, bus.Pause)
            self.station.set_paused(self._is_paused)
            self._finish(taken, "DONE", f"before step {self._step}")
        elif isinstance(command, bus.Stop):
            self._stopped_by = command
            self._finish(taken, "DONE", f"stopped before step {self._step}")
        elif isinstance(command, bus.Checkpoint) and self._saved is not None:
            self._should_save = True
            self._finish(taken, "DONE", "will be saved at the next step boundary")
        elif isinstance(command, bus.Checkpoint):
            self._finish(taken, "REFUSED", "the run keeps no checkpoints; start it with them")
        else:
            self._finish(taken, "REFUSED", f"{type(command).__name__} is nothing a run can do")

    def _defer(self, taken: Taken) -> None:
        if len(self._deferred) < _MAX_DEFERRED:
            self._deferred.append(taken)
        else:
            self._finish(taken, "REFUSED", f"paused, and {_MAX_DEFERRED} commands wait; resume it")

    def _translate(self, taken: Taken) -> _Rows | None:
        command = taken.command
        parts = command.commands if isinstance(command, bus.Batch) else (command,)
        if len(parts) > self.max_commands:
            words = f"{len(parts)} commands in a batch; this run takes {self.max_commands} a step"
            self._finish(taken, "REFUSED", words)
            return None
        try:
            rows = [to_core(self._growth, part) for part in parts]
            if len({row.seed for row in rows}) < len(rows):
                raise ValueError("a batch names a seed twice; send the second command after it")
            if isinstance(command, bus.Batch):
                rows = commands.batch(rows, command.id)
            # It knows every name; what it refuses must not reach the loop.
            commands.pack_on_host(self._growth.layout, self._grafts, rows, self.max_commands)
        except (EsperError, ValueError) as error:
            self._finish(taken, "REFUSED", str(error))
            return None
        return _Rows(taken, rows)

    def _answer(self, rows: _Rows, outcomes: Any, at: int, count: int, step: int) -> None:
        codes = [Code(int(code)) for code in outcomes.code[0, at : at + count]]
        seeds = tuple(
            SeedOutcome(
                seed=row.seed,
                code=code.name,
                before=stage_name(outcomes.before[0, at + i]),
                after=stage_name(outcomes.after[0, at + i]),
            )
            for i, (row, code) in enumerate(zip(rows.commands, codes, strict=True))
        )
        bad = [code for code in codes if code is not Code.DONE]
        # The cause, before what it caused.
        code = next((c for c in bad if c is not Code.BATCH_REFUSED), bad[0] if bad else Code.DONE)
        self.station.finish(
            rows.taken,
            Outcome(
                command_id=rows.taken.command.id,
                code=code.name,
                words=WORDS.get(code, ""),
                step=step,
                seeds=seeds,
            ),
        )

    def _finish(self, taken: Taken, code: str, words: str) -> None:
        outcome = Outcome(
            command_id=taken.command.id, code=code, words=words[:2_000], step=self._step
        )
        self.station.finish(taken, outcome)

    def _tell(self, segment: Segment) -> None:
        # The thread makes the words: the step that follows does not wait for them.
        station, told = self.station, self._teller.told(segment)
        station.offer_later(lambda: self._teller.messages(told, num_dropped=station.num_dropped))
        saved = None if self._saved is None else self._saved.newly_saved()
        if self._saved is not None and saved is not None:
            station.offer([bus.CheckpointEvent(step=saved, what="saved")])
            if (cursor := self._saved.oldest()) is not None:
                station.kept_from(cursor)


def both(
    first: Callable[[Segment], None] | None, second: Callable[[Segment], None]
) -> Callable[[Segment], None]:
    """Tells two listeners."""

    def tell(segment: Segment) -> None:
        second(segment)
        if first is not None:
            first(segment)

    return tell
