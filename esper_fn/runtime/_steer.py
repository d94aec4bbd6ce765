"""From an address to a `Steering`."""

from __future__ import annotations

import os
import socket

from esper_fn import bus
from esper_fn._growth import Growth
from esper_fn._version import __version__
from esper_fn.bus._connect import make_transport
from esper_fn.bus._session import WorkerOptions
from esper_fn.bus._worker import Worker
from esper_fn.runtime._steering import Steering


def steer(
    url: str,
    growth: Growth,
    *,
    run: str,
    keys: bus.Keyring | None = None,
    position: bus.RunPosition | None = None,
    max_commands: int = 16,
    frames_per_second: float = 10.0,
    should_take_over: bool = False,
    broker: bus.Broker | None = None,
) -> Steering:
    """Connects a run to a bus, for `fit(..., steering=...)`.

    Args:
      url: `memory` (inside this process), `redis://`, `rediss://` or `unix://`.
      growth: the static part of the run.
      run: name of the run.
      keys: commands must be signed with one of these; by default keys of the environment.
      position: the commands that are applied already; by default none are.
      max_commands: most commands to apply in one segment.
      frames_per_second: most reports of the state of all seeds in a second.
      should_take_over: take the run over from an active process.
      broker: the broker of `memory`.

    Returns:
      A context to open around `fit`.

    Raises:
      BusAddressError: the address or the name is not valid.
    """
    chosen = bus.read_keys() if keys is None else keys
    make_transport(url, run, keys=chosen, broker=broker)  # checks the address
    announcement = bus.Announcement(
        run=run,
        host=socket.gethostname(),
        pid=os.getpid(),
        sites={site.name: site.num_seeds for site in growth.layout.sites},
        blueprints=growth.layout.names,
        grafts=tuple(graft.name for graft in growth.grafts),
        version=__version__,
    )
    options = WorkerOptions(keys=chosen, should_take_over=should_take_over)

    def make_worker(restored: bus.RunPosition | None) -> Worker:
        return Worker(
            lambda: make_transport(url, run, keys=chosen, broker=broker),
            announcement,
            position=position if restored is None else restored,
            options=options,
        )

    return Steering(
        growth, make_worker, max_commands=max_commands, frames_per_second=frames_per_second
    )
