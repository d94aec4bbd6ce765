"""From an address to a `Steering`."""

from __future__ import annotations

import os
import socket

from esper_fn import bus
from esper_fn._growth import Growth
from esper_fn._version import __version__
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
    """Takes a run's place on a bus.

    Args:
      url: `memory` (inside this process), `redis://`, `rediss://` or `unix://`.
      growth: the static part of the run.
      run: its name on the bus.
      keys: commands must be signed with one of them; from the environment where left out.
      position: what is in force already; from a checkpoint.
      max_commands: taken in one segment.
      frames_per_second: of the state of all seeds.
      should_take_over: even from a process that lives.
      broker: for `memory`.

    Raises:
      BusAddressError: an address or a name that is none.
    """
    keys = bus.read_keys() if keys is None else keys
    chosen = keys
    bus.make_transport(url, run, keys=chosen, broker=broker)  # refuses what is wrong, at once
    sites = {place.name: place.num_seeds for place in growth.layout.sites}
    announcement = bus.Announcement(
        run=run,
        host=socket.gethostname(),
        pid=os.getpid(),
        sites=sites,
        blueprints=growth.layout.names,
        grafts=tuple(graft.name for graft in growth.grafts),
        version=__version__,
    )

    def station(at: bus.RunPosition | None) -> bus.Station:
        return bus.Station(
            lambda: bus.make_transport(url, run, keys=chosen, broker=broker),
            announcement,
            position=position if at is None else at,
            keys=chosen,
            should_take_over=should_take_over,
        )

    return Steering(growth, station, max_commands=max_commands, frames_per_second=frames_per_second)
