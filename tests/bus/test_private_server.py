"""The server of demos and tests ends with its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from esper_fn import bus
from esper_fn.bus import _server

OWNER = """
import os, sys
from esper_fn.bus import PrivateServer
server = PrivateServer()
server.start()
print(server.process.pid, flush=True)
sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_does_not_outlive_an_owner_that_is_killed(number):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        pid = int(owner.stdout.readline())
        assert is_running(pid)
        owner.send_signal(number)
        owner.wait()
        end = time.monotonic() + 20
        while is_running(pid):
            assert time.monotonic() < end, "the server is still running"
            time.sleep(0.05)


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_its_files_are_in_memory_where_there_is_room(free, monkeypatch, tmp_path):
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(_server, "_MEMORY", tmp_path)
    monkeypatch.setattr(_server.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with bus.PrivateServer() as server:
        assert server.folder.is_relative_to(tmp_path) == bool(free)
        assert server.folder.stat().st_mode & 0o077 == 0
    assert not server.folder.exists()


def test_where_tmpdir_says_otherwise_its_files_go_there(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert _server._memory_folder() is None


def test_started_again_after_a_kill_and_stopped():
    with bus.PrivateServer() as server:
        first = server.process.pid
        server.kill()
        assert not is_running(first)
        server.start()
        second = server.process.pid
        assert is_running(second)
    assert not is_running(second)
