"""Helpers: coroutines, streams, and data that a bus in memory loses."""

from __future__ import annotations

import asyncio
from secrets import token_hex

from esper_fn.bus._memory import MemoryTransport, Run, Stream


def run_async(main, *transports):
    """Runs a coroutine and closes the transports in its loop."""

    async def whole():
        try:
            return await asyncio.wait_for(main, 60)
        finally:
            for transport in transports:
                await transport.close()

    return asyncio.run(whole())


async def page(transport, topic, *, after="0-0", limit=100):
    """Entries after one, without waiting."""
    return await transport.tail({topic: after}, limit=limit, wait_seconds=0.0)


async def length(transport, topic):
    """Entries of a stream."""
    if isinstance(transport, MemoryTransport):
        return len(transport._run().streams[topic].entries)
    return int(await transport._keys.call("XLEN", transport.stream(topic)))


def lose_all(broker):
    """Loses all data, like a server that is restarted without its files."""
    with broker.lock:
        broker.runs.clear()
        broker.generation = token_hex(8)
    broker.wake()


def lose(broker, run, *topics):
    """Loses streams with their groups, as by DEL; without topics, all data but the streams."""
    with broker.lock:
        streams = broker.runs[run].streams
        if topics:
            streams.update({topic: Stream() for topic in topics})
        else:
            broker.runs[run] = Run(streams=streams)
    broker.wake()


def lose_groups(broker, run):
    """Loses the consumer groups of a run, as by XGROUP DESTROY."""
    with broker.lock:
        for stream in broker.runs[run].streams.values():
            stream.start_group(0)
    broker.wake()
