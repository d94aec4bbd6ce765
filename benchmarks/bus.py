"""The bus on a real Redis, in separate processes, beside bare redis-py and FastStream."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._bus_loop import Ask, loop_rows
from benchmarks._timing import Row, exact, summarise
from esper_fn import bus

_ROOT = Path(__file__).resolve().parents[1]


def measure(*, quick: bool) -> Mapping[str, Row]:
    """All rows; `quick` sends fewer messages."""
    rows: dict[str, Row] = {}
    logging.getLogger("esper_fn.bus").setLevel(logging.ERROR)  # servers are killed on purpose
    with _server() as server:
        rows |= _telemetry(server, repeats=1 if quick else 2, scale=1 if quick else 2)
        rows |= _raw(server)
    rows |= _commands(seconds=2 if quick else 60, rounds=1 if quick else 3)
    # A server that has just taken a million messages still writes to its disk.
    with bus.PrivateServer() as server:
        rows |= loop_rows(server, _ask(server, 40 if quick else 400), num_pairs=4 if quick else 120)
    return rows


def _server() -> bus.PrivateServer:
    return bus.PrivateServer(options={"appendfsync": "everysec"})


def _telemetry(server: bus.PrivateServer, *, repeats: int, scale: int) -> dict[str, Row]:
    pairs = {
        "telemetry_ours": ("publish_telemetry", "consume_telemetry", "messages", 40_000 * scale),
        "telemetry_frames_1k": ("publish_telemetry", "consume_telemetry", "frames", 1_000 * scale),
        "telemetry_redis_script": ("bare_publish", "bare_consume", "script", 20_000 * scale),
        "telemetry_redis_pipeline": ("bare_publish", "bare_consume", "pipeline", 10_000 * scale),
        "telemetry_faststream": ("fast_publish", "fast_consume", "one", 3_000 * scale),
    }
    rates: dict[str, list[float]] = {name: [] for name in pairs}
    sizes: dict[str, float] = {}
    lost = 0
    for _ in range(repeats):
        for name, (producer, consumer, kind, count) in pairs.items():
            results = _pair(server, producer, consumer, {"kind": kind, "count": count})
            # From the first message read to the last one.
            rates[name].append(results["seen"] / max(results["seconds"], 1e-9))
            if name.startswith(("telemetry_ours", "telemetry_frames")):
                lost += count - results["seen"]
                sizes[name] = results["bytes"] / max(1, results["seen"])
    rows = {
        name: summarise(values, "messages/s", bytes_a_message=sizes.get(name, 300))
        for name, values in rates.items()
    }
    against = [
        ours / theirs
        for ours, theirs in zip(rates["telemetry_ours"], rates["telemetry_faststream"], strict=True)
    ]
    rows["telemetry_ours_over_faststream"] = summarise(against, "ratio")
    rows["telemetry_lost"] = exact(lost, "messages")
    return rows


def _commands(*, seconds: int, rounds: int) -> dict[str, Row]:
    """Ours and bare redis-py in turns, each under the same load for as long.

    A round is a p99 of its own; neighbours come and go, so one round says little. Each turn has a
    server of its own: what others have left in one is copied whenever it rewrites its file.
    """
    rate = 10_000
    options = {"rate": rate, "count": rate * seconds}
    sides = {"": ("send_commands", "receive_commands"), "redis_": ("bare_send", "bare_receive")}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            with _server() as server:
                results[name].append(_pair(server, *sides[name], options))
    rows: dict[str, Row] = {}
    for name, each in results.items():
        by_second = np.median(np.concatenate([result["p99_by_second"] for result in each]))
        cost = sum(result["cpu_seconds"] for result in each) / (rounds * options["count"]) * 1e6
        for which in ("p50", "p99"):
            rows[f"commands_{name}{which}"] = summarise(
                [result[which] / 1000 for result in each],  # of seconds
                "ms",
                p99_of_the_median_second_ms=by_second,
                cpu_us_a_message=cost,
                offered_per_second=rate,
                seconds=seconds,
            )
    ours, bare = ([result["p99"] for result in each] for each in results.values())
    over = [result / other for result, other in zip(ours, bare, strict=True)]
    rows["commands_p99_over_redis"] = summarise(over, "ratio")
    lost = sum(options["count"] - result["seen"] for result in results[""])
    rows["commands_lost"] = exact(lost, "messages", of=rounds * options["count"])
    return rows


def _ask(server: bus.PrivateServer, count: int) -> Ask:
    def ask(run: str, step_seconds: float, cores: list[int]) -> dict[str, Any]:
        options = {
            "url": server.url,
            "run": run,
            "count": count,
            "step_seconds": step_seconds,
            "cores": cores,
        }
        return _result(_start("ask", options), "ask")

    return ask


def _raw(server: bus.PrivateServer) -> dict[str, Row]:
    program = os.environ.get("ESPER_REDIS_BENCHMARK") or shutil.which("redis-benchmark")
    if program is None:
        return {}
    output = subprocess.run(
        [program, "-s", str(server.socket), "-n", "200000", "-c", "50", "-P", "16", "-q", "--csv",
         "XADD", "raw", "MAXLEN", "~", "1000", "*", "m", "x" * 300],
        check=True,
        capture_output=True,
        text=True,
    )  # fmt: skip
    rate = float(
        output.stdout.strip()
        .splitlines()[-1]
        .split(",")[-7 if "," in output.stdout else 1]
        .strip('"')
    )
    return {"redis_benchmark_xadd": exact(rate, "messages/s", connections=50, pipeline=16)}


def _pair(
    server: bus.PrivateServer, producer: str, consumer: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    options = {**options, "url": server.url, "run": f"b-{secrets.token_hex(6)}"}
    reader = _start(consumer, options)
    stdout: Any = reader.stdout
    for line in stdout:  # FastStream logs on stdout
        if line.strip() == "ready":
            break
    else:
        raise RuntimeError(f"{consumer} did not start")
    writer = _start(producer, options)
    sent = _result(writer, producer)
    results = _result(reader, consumer)
    both = sent["cpu_seconds"] + results["cpu_seconds"]
    return {**sent, **results, "cpu_seconds": both}


def _start(side: str, options: Mapping[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks._bus_sides", side, json.dumps(options)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen[str], side: str) -> dict[str, Any]:
    out, _ = process.communicate(timeout=300)
    if process.returncode:
        raise subprocess.SubprocessError(f"{side} ended with status {process.returncode}")
    results: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return results
