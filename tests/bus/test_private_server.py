"""The server of demos and tests ends with its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from esper_fn import bus

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


def test_started_again_after_a_kill_and_stopped():
    with bus.PrivateServer() as server:
        first = server.process.pid
        server.kill()
        assert not is_running(first)
        server.start()
        second = server.process.pid
        assert is_running(second)
    assert not is_running(second)
