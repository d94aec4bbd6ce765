"""What others wrote cannot steer a terminal: every command shows it escaped."""

from __future__ import annotations

import asyncio
import os
import pty
import secrets
import subprocess
import sys
import threading
import time

import pytest
import redis

from esper_fn import bus
from esper_fn.bus._address import parse_address
from esper_fn.bus._connect import make_transport
from esper_fn.bus._envelope import Header, Schema
from esper_fn.bus._transport import Entry
from esper_fn.bus._worker import Worker
from esper_fn.cli import main

EVIL = "\x1b]0;evil\x07\x1b[31m\x9b2J\u202edlrow\u2066\u200b\r\n[bold][/bad]\x00"
SAFE = r"\x1b]0;evil\x07\x1b[31m\x9b2J\u202edlrow\u2066\u200b\r\n[bold][/bad]\x00"


@pytest.fixture(scope="module")
def server():
    with bus.PrivateServer() as running:
        yield running


@pytest.fixture
def run_name():
    return f"run-{secrets.token_hex(4)}"


def _messages():
    letter = bus.DeadLetter(
        reason=EVIL, text=EVIL, from_topic=bus.Topic.COMMANDS, entry_id=EVIL, size_bytes=1
    )
    event = bus.LifecycleEvent(
        step=1, seed=0, site=EVIL, layer=0, chunk=0, source=EVIL, target=EVIL, cause=EVIL,
    )  # fmt: skip
    return [
        bus.StepMetrics(step=1, loss=0.5, stages={EVIL: 4, "[/bad]": 1, "[red]": 2}),
        bus.Announcement(run=EVIL, host=EVIL, pid=1, sites={EVIL: 1}),
        event,
        bus.Alert(name=EVIL, level="warning", text=EVIL),
        letter,
        bus.Outcome(command_id="c", code=EVIL, text=EVIL),
        bus.CheckpointEvent(step=1, what="saved", text=EVIL),
    ]


async def _publish(transport, number, messages):
    for index, message in enumerate(messages):
        producer = f"p{index}-{number}"
        header = Header(format=1, producer=producer, sequence=0, issued_at_ms=0)
        entry = Entry(Schema().encode(header, [message]))
        await transport.publish(message.topic, producer, 0, [entry])


@pytest.fixture
def talking(server, run_name):
    """A run that says the same evil things over and over."""
    stop = threading.Event()
    announcement = bus.Announcement(run=run_name, host="h", pid=1, sites={"hidden": 4})
    worker = Worker(lambda: make_transport(server.url, run_name, keys=bus.NO_KEYS), announcement)

    async def talk():
        transport = make_transport(server.url, run_name, keys=bus.NO_KEYS)
        number = 0
        while not stop.is_set():
            await _publish(transport, number, _messages())
            number += 1
            await asyncio.sleep(0.05)
        await transport.close()

    with worker:
        thread = threading.Thread(target=asyncio.run, args=(talk(),))
        thread.start()
        yield
        stop.set()
        thread.join()


def _check(text: str) -> None:
    assert r"\x1b]0;evil" in text
    assert "\u202e" not in text
    for sign in "\x07\x9b\x00\u2066\u200b":
        assert sign not in text
    assert "\x1b]0;" not in text
    assert "\x1b[31m\x9b" not in text


def test_a_piped_watch_shows_them_escaped(server, run_name, talking, capsys):
    assert main(["watch", "--bus", server.url, "--run", run_name, "--seconds", "1"]) == 0
    text = capsys.readouterr().out
    _check(text)
    assert "\x1b" not in text
    assert f"warning: {SAFE}" in text
    assert f"refused ({SAFE}): {SAFE}" in text
    # Nothing begins a line of its own that the message did not get.
    assert {line.partition(" ")[0] for line in text.splitlines()} <= {
        "step", "warning:", "refused", "checkpoint",
    }  # fmt: skip


def test_watch_on_a_terminal_shows_them_escaped_and_does_not_crash(server, run_name, talking):
    above, below = pty.openpty()
    text = b""
    process = subprocess.Popen(
        [sys.executable, "-m", "esper_fn.cli", "watch", "--bus", server.url, "--run", run_name,
         "--seconds", "2"],
        stdout=below, stderr=below, env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
    )  # fmt: skip
    os.close(below)
    try:
        while piece := os.read(above, 65_536):
            text += piece
    except OSError:
        pass  # how a terminal says that nobody writes any more
    assert process.wait(10) == 0, text.decode()
    os.close(above)
    _check(text.decode())
    assert "[/bad]" in text.decode()
    assert "Traceback" not in text.decode()


def test_dead_letters_and_outcomes_are_shown_escaped(server, run_name, talking, capsys):
    time.sleep(0.2)
    where = ["--bus", server.url, "--run", run_name]
    assert main(["dlq", *where, "list"]) == 0
    listed = capsys.readouterr().out
    _check(listed)
    assert SAFE in listed
    name = listed.split()[0]
    assert main(["dlq", *where, "show", name]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert main(["dlq", *where, "show", EVIL]) == 1
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "no dead letter" in error


def test_what_cannot_be_a_run_is_in_no_list_of_runs(server, run_name, talking, capsys):
    direct = redis.Redis(unix_socket_path=dict(parse_address(server.url).options)["path"])
    keys = [f"esper:{{{EVIL}}}:lease", b"esper:{\xff\xfe}:lease"]
    for key in keys:
        direct.set(key, "1 x")
    try:
        with bus.connect(server.url, run="any", keys=bus.NO_KEYS) as client:
            assert client.active_runs() == [run_name]
        assert main(["send", "pause", "--bus", server.url, "--run", "nobody"]) == 1
        error = capsys.readouterr().err
        assert run_name in error
        assert error == error.replace("\x1b", "").replace("\u202e", "")
    finally:
        for key in keys:
            direct.delete(key)
        direct.close()


def test_an_unreadable_message_is_logged_escaped(server, run_name, talking, caplog):
    async def poison():
        transport = make_transport(server.url, run_name, keys=bus.NO_KEYS)
        header = Header(format=1, producer="evil", sequence=0, issued_at_ms=0)
        good = Schema().encode(header, [bus.Batch(commands=(bus.Cull(seed=1),))])
        bad = good.replace(b"\xa6cull/1", b"\xa6\x1b[2J/1")
        assert bad != good
        await transport.publish(bus.Topic.EVENTS, "evil", 0, [Entry(bad)])
        await transport.close()

    with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
        asyncio.run(poison())
        end = time.monotonic() + 5
        while not client.asynchronous.num_refused and time.monotonic() < end:
            for _ in client.watch(seconds=0.2, from_beginning=True):
                pass
    assert "is refused" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    "call",
    [
        ["report", EVIL.replace("\x00", "")],
        ["checkpoint", "list", EVIL.replace("\x00", "")],
        ["export", EVIL.replace("\x00", "")],
        ["send", "pause", "--run", EVIL],
        ["send", "pause", "--bus", EVIL],
        ["grow", "--data", EVIL],
        ["grow", EVIL],
        [EVIL],
        ["bus-key", "--name", EVIL],
    ],
)
def test_an_argument_comes_back_escaped(call, capsys):
    try:
        status = main(call)
    except SystemExit as end:
        status = end.code
    assert status in {1, 2}
    said = capsys.readouterr()
    for sign in "\x1b\x07\x9b\u202e\u2066\u200b":
        assert sign not in said.err + said.out
    assert "Traceback" not in said.err


def test_names_in_a_report_cannot_steer_whoever_shows_it(tmp_path):
    from esper_fn import report

    event = {
        "arm": "grown", "step": 1, "seed": 0, "site": EVIL, "chunk": 0, "blueprint": EVIL,
        "from": "DORMANT", "to": "GERMINATED", "cause": EVIL, "measured": {EVIL: 0.5},
    }  # fmt: skip
    with report.create(tmp_path / "run") as folder:
        folder.append_event(event)
        folder.append_metrics({"arm": "grown", "step": 1, "loss": 0.5, "alpha": {"0": 0.5}})
        folder.finish({"data": EVIL, "host": EVIL, "policy": EVIL, EVIL: {EVIL: [EVIL]}})
    page = report.write_report(tmp_path / "run").read_text(encoding="utf-8")
    for sign in "\x1b\x07\x9b\x00\u202e\u2066\u200b":
        assert sign not in page
    assert "evil" in page
