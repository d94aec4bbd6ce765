"""A real server for the whole session, and both transports by one fixture."""

from __future__ import annotations

import secrets
import threading
import time

import pytest

from esper_fn import bus
from esper_fn.bus._address import parse_address
from esper_fn.bus._memory import MemoryTransport
from esper_fn.bus._redis import RedisTransport


@pytest.fixture(scope="session")
def server():
    with bus.PrivateServer(with_port=True) as running:
        yield running


@pytest.fixture
def run_name():
    return f"run-{secrets.token_hex(6)}"


@pytest.fixture(params=["memory", "redis"])
def kind(request):
    return request.param


@pytest.fixture
def make(kind, request, run_name):
    """Makes transports that share one server; a test closes none of them."""
    broker = bus.Broker()
    url = request.getfixturevalue("server").url if kind == "redis" else "memory"

    def make(run=run_name):
        if kind == "memory":
            return MemoryTransport(run, broker)
        return RedisTransport(parse_address(url), run, has_key=False)

    return make


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """A test that leaves a talking thread behind disturbs the next ones: it fails."""
    yield
    end = time.monotonic() + 5
    while left := [t.name for t in threading.enumerate() if t.name.startswith("esper-bus")]:
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.01)
