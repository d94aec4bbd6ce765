"""`esper send`, `stop`, `watch`, `dlq` against a run on a real server."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from esper_fn import bus
from esper_fn.bus._connect import make_transport
from esper_fn.bus._worker import Worker
from esper_fn.cli import main


@pytest.fixture(scope="module")
def server():
    with bus.PrivateServer() as running:
        yield running


@pytest.fixture
def run_name():
    return f"run-{secrets.token_hex(4)}"


@pytest.fixture
def loop(server, run_name):
    announcement = bus.Announcement(run=run_name, host="h", pid=1, sites={"hidden": 4})
    worker = Worker(lambda: make_transport(server.url, run_name, keys=bus.NO_KEYS), announcement)
    done, stop = [], threading.Event()

    def work():
        step = 0
        while not stop.is_set():
            for taken in worker.take(step, 4):
                done.append(taken.command)
                code = "DONE" if getattr(taken.command, "seed", 0) < 4 else "UNKNOWN_SEED"
                seeds = (bus.SeedOutcome(seed=1, code=code, before="DORMANT", after="GERMINATED"),)
                worker.finish(
                    taken,
                    bus.Outcome(command_id=taken.command.id, code=code, step=step, seeds=seeds),
                )
            worker.flush()
            worker.offer([bus.StepMetrics(step=step, loss=0.5, stages={"DORMANT": 4})])
            step += 1
            time.sleep(0.005)

    with worker:
        thread = threading.Thread(target=work)
        thread.start()
        yield done
        stop.set()
        thread.join()


@pytest.fixture
def esper(server, run_name, capsys):
    def call(*arguments, run=run_name):
        where = ["--bus", server.url] + (["--run", run] if run else [])
        status = main([arguments[0], *where, *arguments[1:]])
        return status, *capsys.readouterr()

    return call


def test_send_waits_for_the_outcome_and_shows_it(esper, loop):
    arguments = ("send", "germinate", "--site", "hidden", "--seed", "1", "--blueprint", "mlp")
    status, out, _ = esper(*arguments, "--wait")
    assert status == 0
    assert "DONE" in out
    assert "seed 1: DONE, DORMANT to GERMINATED" in out
    assert loop[0].blueprint == "mlp"
    assert loop[0].site == "hidden"
    status, out, _ = esper("send", "cull", "--seed", "9", "--wait", "10", run=None)
    assert status == 1
    assert "UNKNOWN_SEED" in out
    status, out, _ = esper("send", "pause")
    assert (status, out[:9]) == (0, "accepted:")


def test_a_batch_comes_from_a_file(esper, loop, tmp_path):
    path = tmp_path / "batch.json"
    path.write_text(json.dumps([{"kind": "cull", "seed": 1}, {"kind": "pause-seed", "seed": 2}]))
    assert esper("send", "batch", "--file", str(path), "--wait")[0] == 0
    assert [type(part) for part in loop[0].commands] == [bus.Cull, bus.PauseSeed]


def test_stop_sends_a_stop(esper, loop):
    status, _, _ = esper("stop", "--reason", "enough")
    assert status == 0
    assert isinstance(loop[0], bus.Stop)
    assert loop[0].reason == "enough"


def test_watch_tells_a_plain_terminal_line_by_line(esper, loop):
    status, out, _ = esper("watch", "--seconds", "0.5")
    assert status == 0
    assert "loss 0.5000, {'DORMANT': 4}" in out


def test_watch_serves_metrics(esper, loop, run_name):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pages = []

    def ask():
        end = time.monotonic() + 10
        while not pages and time.monotonic() < end:
            with contextlib.suppress(OSError):
                url = f"http://127.0.0.1:{port}/metrics"
                with urllib.request.urlopen(url, timeout=2) as page:
                    text = page.read().decode()
                if "esper_loss{" in text:
                    pages.append(text)
            time.sleep(0.05)

    asking = threading.Thread(target=ask)
    asking.start()
    assert esper("watch", "--seconds", "2", "--metrics-port", str(port))[0] == 0
    asking.join()
    assert f'esper_loss{{run="{run_name}"}} 0.5' in pages[0]


def test_nobody_listening_is_said_and_nothing_hangs(esper):
    began = time.monotonic()
    for arguments in (("send", "pause", "--wait"), ("stop",), ("watch",)):
        status, _, err = esper(*arguments, run="nowhere")
        assert status == 1
        assert "nobody listens to run 'nowhere'" in err
    status, _, err = esper("send", "pause", run=None)
    assert status == 1
    assert "runs are active on" in err
    assert time.monotonic() - began < 10


def test_no_server_is_said(capsys, tmp_path):
    assert main(["send", "pause", "--bus", f"unix://{tmp_path}/none.sock"]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert main(["send", "pause", "--bus", "memory"]) == 1
    assert "lies inside the process" in capsys.readouterr().err
    assert main(["send", "pause", "--bus", "http://x"]) == 1
    assert "write one like memory, redis://" in capsys.readouterr().err
    assert main(["send", "pause", "--bus", "redis://192.0.2.7:6379"]) == 1
    assert "no key is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["germinate", "--seed", "1"], "--blueprint is missing"),
        (["cull"], "--seed is missing"),
        (["pause", "--seed", "1"], "--seed does not belong to it"),
        (["cull", "--seed", "-1"], "not a whole number"),
        (["cull", "--seed", "x"], "not a whole number"),
        (["cull", "--seed", "1", "--expires", "0"], "no number of seconds"),
        (["cull", "--seed", "1", "--site", "s" * 300], "length"),
        (["fly"], "invalid choice"),
    ],
)
def test_a_wrong_call_names_the_argument(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["send", *arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_dead_letters_are_listed_shown_replayed_and_dropped(esper, loop, server, run_name):
    with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
        client.send(bus.Cull(seed=1, expires_after_seconds=1e-9), wait_seconds=10)
        client.send(bus.Cull(seed=2, expires_after_seconds=1e-9), wait_seconds=10)
        (first, letter), (second, _) = client.dead_letters()
    assert letter.reason == "expired"
    status, out, _ = esper("dlq", "list")
    assert status == 0
    assert "2 dead letters" in out
    assert first in out
    assert "older than" in esper("dlq", "show", first)[1]
    assert esper("dlq", "drop", second)[1] == "1 dropped\n"
    assert "sent again" in esper("dlq", "replay", first)[1]
    assert "no dead letter '1-1'" in esper("dlq", "show", "1-1")[2]


def test_a_fresh_key_is_one(capsys):
    assert main(["bus-key"]) == 0
    text = capsys.readouterr().out.strip()
    assert bus.read_keys({"ESPER_BUS_KEYS": text}).active == "first"


@pytest.mark.slow
def test_grow_is_steered_and_stopped_from_another_process(server, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "esper_fn.cli", "grow", "--steps", "4000", "--policy", "never",
         "--bus", server.url, "--run", "e2e", "--out", str(tmp_path / "run")],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    with bus.connect(server.url, run="e2e", keys=bus.NO_KEYS) as client:
        end = time.monotonic() + 240
        while "e2e" not in client.active_runs():
            assert time.monotonic() < end
            time.sleep(0.1)
        born = client.send(bus.Germinate(seed=0, blueprint="bottleneck"), wait_seconds=200)
        assert born.is_applied
        assert client.send(bus.Stop(reason="e2e", sender="t"), wait_seconds=60).is_applied
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "by t: e2e" in errors
