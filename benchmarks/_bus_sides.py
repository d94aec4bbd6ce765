"""The producing and the consuming process of the bus's measurements, ours and the rivals'.

Each side is a process: `python -m benchmarks._bus_sides SIDE OPTIONS`, one JSON object in, one out.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import redis.asyncio as redis_asyncio

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._address import parse_address
from esper_fn.bus._connect import make_transport, new_event_loop
from esper_fn.bus._envelope import SCHEMA, Link
from esper_fn.bus._outbox import Publisher
from esper_fn.bus._redis import RedisTransport
from esper_fn.bus._transport import BEGINNING, Delivery
from esper_fn.bus._worker import Worker
from esper_fn.errors import BusyError

Side = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
_BALLAST = bytes(200)
_WAIT_SECONDS = 20.0


def metrics(number: int) -> bus.StepMetrics:
    """A message of about 300 bytes."""
    return bus.StepMetrics(
        step=number,
        loss=0.25 + number % 7,
        steps_per_second=812.5,
        num_live=17,
        num_parameters=123_456,
        stages={"DORMANT": 61, "TRAINING": 2, "GRAFTING": 1},
        values={f"gradient_norm_of_layer_{i}": 0.125 + i + number % 3 for i in range(4)},
    )


def _redis(options: dict[str, Any]) -> Any:
    return redis_asyncio.Redis.from_url(options["url"], protocol=2, socket_timeout=None)


async def publish_telemetry(options: dict[str, Any]) -> dict[str, Any]:
    """Publishes messages as fast as the server takes them, none dropped."""
    transport = make_transport(options["url"], options["run"], keys=bus.NO_KEYS)
    link = Link(transport)
    await link.open()
    publisher = Publisher(link, Topic.TELEMETRY, max_queued=10**9)
    frames = options["kind"] == "frames"
    columns = {
        name: bus.Column.from_array(np.arange(1000).astype(dtype))
        for name, dtype in (("stage", "u1"), ("alpha", "f4"), ("utility", "f4"), ("slot", "i4"))
    }
    began = time.perf_counter()
    sent = 0
    while sent < options["count"]:
        now = min(2_048 if not frames else 64, options["count"] - sent)
        publisher.offer(
            [
                bus.Frame(step=sent + i, columns=columns) if frames else metrics(sent + i)
                for i in range(now)
            ]
        )
        sent += now
        await publisher.drain(60)
    seconds = time.perf_counter() - began
    await publisher.close()
    await transport.close()
    return {"seconds": seconds}


async def consume_telemetry(options: dict[str, Any]) -> dict[str, Any]:
    """Follows the stream as a watcher does, and decodes to structs."""
    transport = make_transport(options["url"], options["run"], keys=bus.NO_KEYS)
    await transport.open()
    seen, first, size = 0, None, 0
    after = {Topic.TELEMETRY: BEGINNING}
    last = time.perf_counter()
    while seen < options["count"]:
        result = await transport.tail(after, limit=64, wait_seconds=_WAIT_SECONDS)
        if not result:
            break
        first = first or time.perf_counter()
        for delivery in result:
            size += len(delivery.payload)
            seen += len(SCHEMA.decode(delivery.payload).messages)
        after[Topic.TELEMETRY] = result[-1].entry_id
        last = time.perf_counter()
    await transport.close()
    return {"seen": seen, "seconds": last - (first or last), "bytes": size}


async def send_commands(options: dict[str, Any]) -> dict[str, Any]:
    """Offers commands at a rate, on a fixed timetable."""
    transport = make_transport(options["url"], options["run"], keys=bus.NO_KEYS)
    await transport.open()
    publisher = Publisher(Link(transport), Topic.COMMANDS, max_queued=10**9)
    futures: deque[asyncio.Future[int]] = deque()
    busy = 0

    async def put(number: int) -> None:
        nonlocal busy
        while futures and futures[0].done():
            busy += isinstance(futures.popleft().exception(), BusyError)
        sender = f"{time.time_ns()}".ljust(200, "x")
        command = bus.Germinate(seed=number, site="hidden", blueprint="bottleneck", sender=sender)
        futures.append(publisher.post(command))

    await _on_time(options, put)
    answers = await asyncio.gather(*futures, return_exceptions=True)
    busy += sum(isinstance(answer, BusyError) for answer in answers)
    await publisher.close()
    await transport.close()
    return {"busy": busy}


class _Noting(RedisTransport):
    """Notes when each entry came out of the server."""

    def __init__(self, options: dict[str, Any], received: dict[str, int]) -> None:
        super().__init__(parse_address(options["url"]), options["run"], has_key=False)
        self._received = received

    async def read(self, *arguments: Any, **options: Any) -> list[Delivery]:
        result = await super().read(*arguments, **options)
        now = time.time_ns()
        self._received.update((delivery.entry_id, now) for delivery in result)
        return result


async def receive_commands(options: dict[str, Any]) -> dict[str, Any]:
    """A run whose loop takes what waits every 5 ms, answers all of it, and settles."""
    waits: list[float] = []
    announcement = bus.Announcement(run=options["run"], host="", pid=0, sites={})
    noted: dict[str, int] = {}
    worker = Worker(lambda: _Noting(options, noted), announcement)

    def work() -> None:
        last = time.monotonic()
        while len(waits) < options["count"] and time.monotonic() - last < _WAIT_SECONDS:
            time.sleep(0.005)
            for item in worker.take(0, 256):
                last = time.monotonic()
                received = noted.pop(item.delivery.entry_id)
                waits.append((received - int(item.command.sender.rstrip("x"))) / 1e6)
                worker.finish(item, bus.Outcome(command_id=item.command.id, code="DONE"))
            worker.flush()

    with worker:
        _say_ready()
        await asyncio.to_thread(work)
    return _latencies(waits)


async def ask(options: dict[str, Any]) -> dict[str, Any]:
    """Sends commands one after the other to a run, at any point of its steps.

    Seconds of each, and the step that applied it.
    """
    source = np.random.default_rng(0)
    waits, steps = [], []
    async with bus.connect_async(options["url"], run=options["run"], keys=bus.NO_KEYS) as client:
        while options["run"] not in await client.transport.active_runs():
            await asyncio.sleep(0.05)
        await client.send(bus.Cull(seed=0), wait_seconds=60)
        for number in range(options["count"]):
            await asyncio.sleep(float(source.uniform(0, 2 * options["step_seconds"])))
            began = time.perf_counter()
            outcome = await client.send(bus.Cull(seed=number % 16), wait_seconds=60)
            waits.append(time.perf_counter() - began)
            steps.append(-1 if outcome is None else outcome.step)
    return {"waits": waits, "steps": steps}


_BATCH = (
    "for i = 1, #ARGV do redis.call('XADD', KEYS[1], 'MAXLEN', '~', 200000, '*', 'm', ARGV[i]) end"
)


async def bare_publish(options: dict[str, Any]) -> dict[str, Any]:
    """300 raw bytes an entry, pipelined by 100 or in a server-side script by 100."""
    client = _redis(options)
    script = client.register_script(_BATCH)
    payload = bytes(300)
    began = time.perf_counter()
    for _ in range(options["count"] // 100):
        if options["kind"] == "script":
            await script(keys=[options["run"]], args=[payload] * 100)
        else:
            async with client.pipeline(transaction=False) as pipe:
                for _ in range(100):
                    pipe.xadd(options["run"], {"m": payload}, maxlen=200_000)
                await pipe.execute()
    seconds = time.perf_counter() - began
    await client.aclose()
    return {"seconds": seconds}


async def bare_consume(options: dict[str, Any]) -> dict[str, Any]:
    """Follows the stream by 100; nothing is decoded."""
    client = _redis(options)
    _say_ready()
    seen, first, after = 0, None, b"0"
    last = time.perf_counter()
    while seen < options["count"]:
        result = await client.xread(
            {options["run"]: after}, count=100, block=int(_WAIT_SECONDS * 1000)
        )
        if not result:
            break
        first = first or time.perf_counter()
        rows = result[0][1]
        after = rows[-1][0]
        seen += len(rows)
        last = time.perf_counter()
    await client.aclose()
    return {"seen": seen, "seconds": last - (first or last)}


async def bare_send(options: dict[str, Any]) -> dict[str, Any]:
    """Offers entries at the same rate: what is due goes out in one pipeline."""
    client = _redis(options)
    due: list[bytes] = []
    wake = asyncio.Event()
    is_over = False

    async def pump() -> None:
        while not is_over or due:
            await wake.wait()
            wake.clear()
            while due:
                batch = due[:128]
                del due[:128]
                async with client.pipeline(transaction=False) as pipe:
                    for payload in batch:
                        pipe.xadd(options["run"], {"m": payload})
                    await pipe.execute()

    async def put(number: int) -> None:
        del number
        due.append(f"{time.time_ns()}".ljust(300, "x").encode())
        wake.set()

    task = asyncio.create_task(pump())
    await _on_time(options, put)
    is_over = True
    wake.set()
    await task
    await client.aclose()
    return {"busy": 0}


async def bare_receive(options: dict[str, Any]) -> dict[str, Any]:
    """Reads a group, notes the time, acknowledges."""
    client = _redis(options)
    with contextlib.suppress(Exception):
        await client.xgroup_create(options["run"], "bench", "0", mkstream=True)
    _say_ready()
    waits: list[float] = []
    while len(waits) < options["count"]:
        result = await client.xreadgroup(
            "bench", "one", {options["run"]: ">"}, count=256, block=int(_WAIT_SECONDS * 1000)
        )
        if not result:
            break
        now = time.time_ns()
        rows = result[0][1]
        waits += [(now - int(row[1][b"m"].rstrip(b"x"))) / 1e6 for row in rows]
        await client.xack(options["run"], "bench", *(row[0] for row in rows))
    await client.aclose()
    return _latencies(waits)


async def fast_publish(options: dict[str, Any]) -> dict[str, Any]:
    """FastStream's publisher, one message a call, a hundred calls at once."""
    from faststream.redis import RedisBroker

    broker = RedisBroker(options["url"], logger=None)  # type: ignore[arg-type]
    await broker.connect()
    payload = bytes(300)
    began = time.perf_counter()
    for _ in range(options["count"] // 100):
        await asyncio.gather(*(broker.publish(payload, stream=options["run"]) for _ in range(100)))
    seconds = time.perf_counter() - began
    await broker.stop()
    return {"seconds": seconds}


async def fast_consume(options: dict[str, Any]) -> dict[str, Any]:
    """FastStream's consumer of a stream, in batches of 100."""
    from faststream.redis import RedisBroker, StreamSub

    broker = RedisBroker(options["url"], logger=None)  # type: ignore[arg-type]
    is_done = asyncio.Event()
    seen, first = 0, None
    last = time.perf_counter()

    @broker.subscriber(
        stream=StreamSub(
            options["run"], last_id="0", batch=True, max_records=100, polling_interval=1000
        )
    )
    async def handle(messages: list[bytes]) -> None:
        nonlocal seen, first, last
        first = first or time.perf_counter()
        seen += len(messages)
        last = time.perf_counter()
        if seen >= options["count"]:
            is_done.set()

    await broker.start()
    _say_ready()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(is_done.wait(), options.get("limit_seconds", 60))
    await broker.stop()
    return {"seen": seen, "seconds": last - (first or last)}


async def _on_time(options: dict[str, Any], put: Callable[[int], Awaitable[None]]) -> None:
    """Calls `put` at a steady rate, in ticks of a millisecond; late ticks are made up for."""
    began = time.perf_counter()
    sent = 0
    while sent < options["count"]:
        due = min(options["count"], int((time.perf_counter() - began) * options["rate"]) + 1)
        while sent < due:
            await put(sent)
            sent += 1
        await asyncio.sleep(0.001)


def _latencies(waits: list[float]) -> dict[str, Any]:
    if not waits:
        return {"seen": 0, "p50": 0.0, "p99": 0.0, "p99_by_second": []}
    p50, p99 = np.quantile(waits, [0.5, 0.99])
    seconds = [np.quantile(part, 0.99) for part in np.array_split(waits, len(waits) // 10_000 or 1)]
    return {
        "seen": len(waits),
        "p50": float(p50),
        "p99": float(p99),
        "p99_by_second": [float(value) for value in seconds],
    }


def _say_ready() -> None:
    print("ready", flush=True)


SIDES: dict[str, Side] = {
    side.__name__: side
    for side in (
        publish_telemetry, consume_telemetry, send_commands, receive_commands, ask, bare_publish,
        bare_consume, bare_send, bare_receive, fast_publish, fast_consume,
    )
}  # fmt: skip


def main() -> None:
    """Runs one side and prints its result."""
    side, options = SIDES[sys.argv[1]], json.loads(sys.argv[2])
    if "cores" in options:
        os.sched_setaffinity(0, options["cores"])
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        if side is consume_telemetry:
            _say_ready()
        gc.collect()
        gc.freeze()
        began = time.process_time()
        result: dict[str, Any] = runner.run(side(options))  # type: ignore[arg-type]
        print(json.dumps({"cpu_seconds": time.process_time() - began, **result}), flush=True)


if __name__ == "__main__":
    main()
