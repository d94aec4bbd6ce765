"""A server that refuses a run: training goes on, and the run comes back once it may."""

from __future__ import annotations

import logging
import time

import pytest
import redis
from test_lost_lease import Rig
from test_worker import until

from esper_fn import bus


@pytest.fixture
def own_server(tmp_path):
    with bus.PrivateServer(tmp_path / "server") as running:
        yield running


@pytest.fixture
def raw(own_server):
    with redis.Redis(unix_socket_path=str(own_server.socket)) as client:
        yield client


def password_changed(raw):
    raw.config_set("requirepass", "other")
    raw.execute_command("AUTH", "other")
    return lambda: raw.config_set("requirepass", "")


def user_off(raw):
    raw.execute_command("ACL", "SETUSER", "default", "off")
    raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    return lambda: raw.execute_command("ACL", "SETUSER", "default", "on")


def rule(*denied):
    def change(raw):
        raw.execute_command("ACL", "SETUSER", "admin", "on", ">pw", "~*", "&*", "+@all")
        raw.execute_command("AUTH", "admin", "pw")
        raw.execute_command("ACL", "SETUSER", "default", *denied)
        return lambda: raw.execute_command("ACL", "SETUSER", "default", "~*", "+@all")

    change.__name__ = "rule " + " ".join(denied)
    return change


REFUSALS = [
    password_changed,
    user_off,
    rule("-xreadgroup"),
    rule("-evalsha", "-eval"),
    rule("-@all"),
    rule("resetkeys", "~other:*"),
    rule("-hget", "-hset"),
]


@pytest.mark.parametrize("change", REFUSALS, ids=lambda change: change.__name__)
def test_a_bus_that_refuses_the_run_ends_nothing(own_server, raw, run_name, change, caplog):
    raw.ping()
    rig = Rig(own_server.url, run_name, None, raw, lease_seconds=0.9)
    try:
        assert rig.client.send(bus.Cull(seed=1), wait_seconds=10).is_applied
        allow = change(raw)
        for client in raw.client_list():
            if client["id"] != str(raw.client_id()):
                raw.client_kill_filter(_id=client["id"])
        before, steps = rig.calls(), rig.loop.step
        time.sleep(1.5)
        assert rig.loop.error is None
        assert rig.loop.step > steps
        assert rig.calls() - before < 400
        said = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert said
        assert "other" not in "".join(record.getMessage() for record in said).split()
        allow()
        stop = bus.Stop()
        began = time.monotonic()
        assert rig.client.send(stop, wait_seconds=10, must_listen=False).is_applied
        assert time.monotonic() - began < 4  # two seconds on a quiet machine
        assert rig.loop.effects[-1] == stop.id
        until(lambda: "bus_refuses" in rig.alerts())
    finally:
        rig.close()
