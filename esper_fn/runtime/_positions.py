"""Which commands a checkpoint may still need."""

from __future__ import annotations

from esper_fn import bus, checkpoint
from esper_fn.bus import Topic
from esper_fn.checkpoint import Writer


class SavedPositions:
    """The positions on the bus of the steps in a checkpoint folder.

    Args:
      writer: writer of the folder.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._cursors: dict[int, dict[Topic, str]] = {}
        self._last_saved = writer.last_acknowledged

    def add(self, step: int, position: bus.RunPosition) -> None:
        """Adds the position of a step that is being saved, or was restored."""
        self._cursors[step] = dict(position.cursor)

    def restore(self, position: bus.RunPosition) -> int:
        """Adds the position of the step that the run was restored to; returns the step."""
        self._last_saved = self._writer.last_acknowledged
        step = -1 if self._last_saved is None else self._last_saved
        self.add(step, position)
        return step

    def newly_saved(self) -> int | None:
        """The step that was saved since the last call, if any."""
        if self._writer.last_acknowledged == self._last_saved:
            return None
        self._last_saved = self._writer.last_acknowledged
        return self._last_saved

    def oldest(self) -> dict[Topic, str] | None:
        """The cursor of the oldest step in the folder; earlier commands are not needed again.

        None if an earlier process saved that step, as its position is unknown. A writer prunes
        after it has acknowledged, so the result may be one save late.
        """
        steps = checkpoint.steps(self._writer.path)
        if not steps:
            return None
        self._cursors = {step: c for step, c in self._cursors.items() if step >= steps[0]}
        return self._cursors.get(steps[0])
