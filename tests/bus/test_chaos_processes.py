"""Processes that die or race: what was accepted acts once, in order, and nothing else does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from test_worker import Loop, until

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._connect import make_transport
from esper_fn.bus._messages import LIMITS
from esper_fn.errors import BusyError

HERE = Path(__file__).parent

SENDER = textwrap.dedent("""
    import asyncio, sys
    from esper_fn import bus

    async def main():
        async with bus.connect_async(sys.argv[1], run=sys.argv[2], keys=bus.NO_KEYS) as client:
            async def one(number):
                command = bus.Cull(seed=number % 5, id=f"c-{number}")
                await client.send(command, wait_seconds=None)
                print(number, flush=True)
            for first in range(0, 1_000_000, 20):
                await asyncio.gather(*(one(first + i) for i in range(20)))

    asyncio.run(main())
""")


def test_a_publisher_that_is_killed_leaves_whole_commands_and_all_that_were_accepted(
    server, run_name
):
    loop = Loop(lambda: make_transport(server.url, run_name, keys=bus.NO_KEYS), limit=50)
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, server.url, run_name], stdout=subprocess.PIPE, text=True
    )
    accepted = [int(sender.stdout.readline()) for _ in range(300)]
    sender.send_signal(signal.SIGKILL)
    accepted += [int(line) for line in sender.communicate()[0].splitlines()]
    assert sender.returncode == -signal.SIGKILL
    until(lambda: len(loop.effects) > max(accepted))
    with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
        after = bus.Cull(seed=0, id="after")
        assert client.send(after, wait_seconds=10).is_applied  # the next sender waits for nobody
        assert client.dead_letters() == []
    # What was on its way may act too; then all before it does, each once and in order.
    *acted, last = loop.effects
    assert acted == [f"c-{number}" for number in range(len(acted))]
    assert last == "after"
    assert loop.worker.counts == {}
    loop.close()


def test_of_two_runs_that_race_for_a_lease_one_acts_at_a_time(server, run_name, tmp_path):
    def effects(folder):
        path = folder / "state.json"
        return json.loads(path.read_text())["effects"] if path.exists() else []

    with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
        commands = [bus.Cull(seed=i % 5) for i in range(40)]
        for command in commands:
            client.send(command, wait_seconds=None, must_listen=False)
        folders = [tmp_path / name for name in ("one", "two")]
        runs = []
        for folder in folders:
            folder.mkdir()
            script = [sys.executable, str(HERE / "run_process.py"), server.url, run_name]
            runs.append(subprocess.Popen([*script, str(folder), "0"]))
        try:
            until(lambda: any(map(effects, folders)), 60)
            # A new command: one sent again may be answered while its second entry still waits, and
            # a process that knows nothing of the first one's state would carry it out.
            commands.append(bus.Cull(seed=0))
            assert client.send(commands[-1], wait_seconds=10, must_listen=False).is_applied
            winner = 0 if effects(folders[0]) else 1
            # An outcome may be told a moment before the file is in its place.
            until(lambda: effects(folders[winner]) == [command.id for command in commands])
            assert effects(folders[1 - winner]) == []
            runs[winner].kill()
            last = bus.Cull(seed=0)
            assert client.send(last, wait_seconds=10, must_listen=False).is_applied
            until(lambda: effects(folders[1 - winner]) == [last.id])
            assert effects(folders[winner]) == [command.id for command in commands]
            assert client.dead_letters() == []
        finally:
            for run in runs:
                run.kill()
                run.wait()


def test_a_flood_is_refused_to_its_sender_and_a_stop_still_comes_first(server, run_name):
    limit = LIMITS[Topic.COMMANDS].max_entries
    loop = Loop(
        lambda: make_transport(server.url, run_name, keys=bus.NO_KEYS), start=False, limit=4
    )
    with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
        publisher = client.asynchronous._publishers[Topic.COMMANDS]

        async def flood():
            publisher._max_queued = 10 * limit
            sent = [publisher.post(bus.Cull(seed=i % 5)) for i in range(limit + 20_000)]
            done, refused = 0, 0
            for future in sent:
                try:
                    await future
                    done += 1
                except BusyError:
                    refused += 1
            return done, refused

        done, refused = client._thread.call(flood(), 120)
        assert refused > 10_000
        assert done + refused == limit + 20_000
        assert limit - 200 <= done <= limit + 3_000  # what the run has read already waits there
        stop = bus.Stop(reason="enough")
        client.send(stop, wait_seconds=None)
        until(lambda: loop.worker._consumer._ready[Topic.URGENT])
        loop.one_step()
        assert loop.effects[0] == stop.id
    loop.close()
