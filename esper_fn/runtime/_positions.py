"""Which commands a checkpoint may still need."""

from __future__ import annotations

from esper_fn import bus, checkpoint
from esper_fn.bus import Topic
from esper_fn.checkpoint import Writer


class SavedPositions:
    """Where the run stood on the bus at each step that a folder keeps.

    Args:
      writer: of the folder.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._cursors: dict[int, dict[Topic, str]] = {}
        self._told = writer.last_acknowledged

    def note(self, step: int, position: bus.RunPosition) -> None:
        """A step is being saved, or was restored, with a position."""
        self._cursors[step] = dict(position.cursor)

    def restored(self, position: bus.RunPosition) -> int:
        """The run goes on from a step with that position; returns the step."""
        self._told = self._writer.last_acknowledged
        step = -1 if self._told is None else self._told
        self.note(step, position)
        return step

    def newly_saved(self) -> int | None:
        """The step that was acknowledged since the last call, if any."""
        if self._writer.last_acknowledged == self._told:
            return None
        self._told = self._writer.last_acknowledged
        return self._told

    def oldest(self) -> dict[Topic, str] | None:
        """The cursor of the oldest step kept: what lies before it is not needed again.

        None where that is not known: steps of an earlier process may still be there. A writer
        prunes after it has acknowledged, so this may lag by one save.
        """
        kept = checkpoint.steps(self._writer.path)
        if not kept:
            return None
        self._cursors = {step: c for step, c in self._cursors.items() if step >= kept[0]}
        return self._cursors.get(kept[0])
