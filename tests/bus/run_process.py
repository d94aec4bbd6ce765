"""A run in a process of its own, for tests that kill it: effects go to a file, one line each.

The file is the state of training, and the position is written with each effect in one replace: as
a checkpoint of every step would.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from esper_fn import bus
from esper_fn.bus._connect import make_transport
from esper_fn.bus._session import WorkerOptions
from esper_fn.bus._worker import Worker
from esper_fn.errors import FencedError, LeaseHeldError


def main():
    url, run, folder, die_after = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    state = {"effects": [], "position": None}
    path = folder / "state.json"
    if path.exists():
        state = json.loads(path.read_text())
    position = None
    if state["position"] is not None:
        position = bus.RunPosition.from_dict(state["position"])
    announcement = bus.Announcement(run=run, host="h", pid=os.getpid(), sites={})
    worker = Worker(
        lambda: make_transport(url, run, keys=bus.NO_KEYS),
        announcement,
        position=position,
        options=WorkerOptions(lease_seconds=0.6),
    )
    while True:
        try:
            worker.start()
            break
        except LeaseHeldError:
            time.sleep(0.1)
    count, step = 0, 0
    try:
        while True:
            worker.wait(0.5)
            for item in worker.take(step, 1):
                if item.command.sender == "poison":
                    os.kill(os.getpid(), 9)
                state["effects"].append(item.command.id)
                worker.finish(item, bus.Outcome(command_id=item.command.id, code="DONE"))
                state["position"] = worker.position().as_dict()
                written = folder / f"state.{os.getpid()}"
                written.write_text(json.dumps(state))
                written.replace(path)
                count += 1
                if count == die_after:
                    os.kill(os.getpid(), 9)  # in force, and nobody knows
                worker.flush()
            step += 1
    except FencedError:
        sys.exit(7)


if __name__ == "__main__":
    main()
