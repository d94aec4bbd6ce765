"""Addresses: each part is read as it is meant, and no password is ever shown."""

from __future__ import annotations

import logging
import re
import traceback

import pytest

from esper_fn import bus
from esper_fn.bus._address import hide_addresses, parse_address
from esper_fn.cli import main
from esper_fn.errors import BusAddressError, EsperError

SECRET = "hunter2"  # noqa: S105 -- what must never be seen

GOOD = {
    f"redis://:{SECRET}@127.0.0.1:1/0": {"password": SECRET, "port": 1, "db": 0},
    f"redis://me:{SECRET}@localhost:1": {"username": "me", "password": SECRET},
    f"redis://{SECRET}@127.0.0.1:1": {"username": SECRET},
    f"redis://:{SECRET}[@127.0.0.1:1/3": {"password": f"{SECRET}[", "db": 3},
    f"redis://:]{SECRET}[a]@127.0.0.1:1": {"password": f"]{SECRET}[a]"},
    f"redis://:{SECRET}@{SECRET}@127.0.0.1:1": {"password": f"{SECRET}@{SECRET}"},
    f"redis://:{SECRET}:x@127.0.0.1:1": {"password": f"{SECRET}:x"},
    f"redis://:{SECRET}%23%2f%3F%25%20@127.0.0.1:1": {"password": f"{SECRET}#/?% "},
    f"redis://127.0.0.1:1?password={SECRET}&username=me": {"password": SECRET, "username": "me"},
    f"redis://127.0.0.1:1/4?password={SECRET}%40&client_name=x": {"password": f"{SECRET}@"},
    f"redis://:{SECRET}@[::1]:1/2": {"host": "::1", "port": 1, "password": SECRET},
    f"redis://:{SECRET}@[fe80::1%25lo]": {"host": "fe80::1%lo", "port": 6379},
    f"REDISS://:{SECRET}@127.0.0.1:1": {"ssl_cert_reqs": "required"},
    f"rediss://:{SECRET}@127.0.0.1:1?ssl_cert_reqs=none&ssl_check_hostname=no": {
        "ssl_cert_reqs": "none", "ssl_check_hostname": False,
    },
    f"unix:///nowhere/none%23.sock?password={SECRET}@&db=5": {
        "path": "/nowhere/none#.sock", "password": f"{SECRET}@", "db": 5,
    },
    f"unix://{SECRET}@/nowhere/no@ne.sock": {"path": "/nowhere/no@ne.sock", "username": SECRET},
    "unix:/nowhere/none.sock": {"path": "/nowhere/none.sock"},
    f" redis://:{SECRET}@127.0.0.1:1\n": {"password": SECRET},
}  # fmt: skip

BAD = {
    f"redis://:{SECRET}#x@127.0.0.1:1/0": "#",
    f"redis://:x#{SECRET}@127.0.0.1:1/0": "#",
    f"redis://127.0.0.1:1/0#{SECRET}": "#",
    f"redis://:{SECRET}@127.0.0.1:port": "the port must be",
    f"redis://:{SECRET}@127.0.0.1:70000": "the port must be",
    f"redis://:{SECRET}@127.0.0.1:": "the port must be",
    f"redis://127.0.0.1:1:{SECRET}": "HOST:PORT",
    f"redis://127.0.0.1:{SECRET}": "the port must be",
    f"redis://:{SECRET}": "the host is missing",
    f"redis://:{SECRET}/x@127.0.0.1:1": "%2F",
    f"redis://:{SECRET}?x@127.0.0.1:1": "%3F",
    f"redis://me:12?{SECRET}=5@127.0.0.1": "%3F",
    f"redis://127.0.0.1:1?password=x@{SECRET}": "%40",
    f"redis://: {SECRET}@127.0.0.1:1": "%20",
    f"redis://:\x1b[31m{SECRET}@127.0.0.1:1": "control character",
    f"redis://:\u202e{SECRET}@127.0.0.1:1": "control character",
    f"redis://:{SECRET}@127.0.0.1:1/99/7": "the database after the host",
    f"redis://:{SECRET}@127.0.0.1:1/zero": "the database after the host",
    f"redis://:{SECRET}@127.0.0.1:1/-1": "the database after the host",
    f"redis://:{SECRET}@127.0.0.1:1/{'9' * 5000}": "the database after the host",
    f"redis://:{SECRET}@127.0.0.1:1/1?db=2": "db is given twice",
    f"redis://:x@127.0.0.1:1/1?password={SECRET}": "password is given twice",
    f"redis://127.0.0.1:1?password={SECRET}&password=x": "password is given twice",
    f"redis://:{SECRET}@127.0.0.1:1?protocol=3": "'protocol'",
    f"redis://:{SECRET}@127.0.0.1:1?decode_responses=True": "'decode_responses'",
    f"redis://:{SECRET}@127.0.0.1:1?socket_timeout=x": "'socket_timeout'",
    f"redis://:{SECRET}@127.0.0.1:1?colour=red": "'colour' is unknown",
    f"redis://127.0.0.1:1?passwrod={SECRET}": "'passwrod' is unknown",
    f"redis://127.0.0.1:1?{SECRET}": "an option is unknown",
    f"redis://127.0.0.1:1?{SECRET}!=x": "an option is unknown",
    f"redis://:{SECRET}@127.0.0.1:1?password=": "'password' has no value",
    f"redis://:{SECRET}@127.0.0.1:1?ssl_ca_certs=/x": "rediss://",
    f"rediss://:{SECRET}@127.0.0.1:1?ssl_cert_reqs=maybe": "'ssl_cert_reqs' must be",
    f"redis://:{SECRET}@[::1:1": "HOST:PORT",
    f"redis://:{SECRET}@[localhost]:1": "no IPv6 address",
    f"redis://:{SECRET}@::1:1": "HOST:PORT",
    f"redis:{SECRET}": "//",
    f"unix://{SECRET}/nowhere/x.sock": "third /",
    f"unix://:{SECRET}": "third /",
    f"unix:{SECRET}": "path of the socket",
    f"http://:{SECRET}@127.0.0.1": "redis://",
    f":{SECRET}@127.0.0.1:1": "redis://",
    SECRET: "redis://",
    "": "redis://",
}


@pytest.mark.parametrize("url", GOOD, ids=range(len(GOOD)))
def test_every_part_of_an_address_is_read_and_no_secret_is_shown(url, caplog, capsys):
    address = parse_address(url)
    options = dict(address.options)
    assert {name: options[name] for name in GOOD[url]} == GOOD[url]
    for text in (repr(address), str(address), f"{address}", address.shown):
        assert SECRET not in text
    assert parse_address(address.shown).options[:2] == address.options[:2] or "***" in (
        address.shown
    )
    keys = bus.Keyring(active="k", keys={"k": b"k" * 32})
    caplog.set_level(logging.DEBUG)
    with pytest.raises(EsperError) as caught:
        bus.connect(url, run="r", keys=keys)
    _check_hidden(caught.value)
    assert main(["send", "pause", "--bus", url, "--run", "r"]) == 1
    assert SECRET not in "".join(capsys.readouterr()) + caplog.text


@pytest.mark.parametrize("url", BAD, ids=range(len(BAD)))
def test_what_is_wrong_with_an_address_is_named_without_the_secret(url, capsys):
    with pytest.raises(BusAddressError) as caught:
        parse_address(url)
    assert BAD[url] in str(caught.value)
    _check_hidden(caught.value)
    for call in (["send", "pause"], ["watch"], ["dlq", "list"], ["stop"]):
        assert main([*call, "--bus", url]) == 1
        said = "".join(capsys.readouterr())
        assert BAD[url] in said
        assert SECRET not in said


def _check_hidden(error: BaseException) -> None:
    shown = "".join(traceback.TracebackException.from_exception(error).format())
    assert SECRET not in shown
    assert SECRET not in repr(error)


def test_a_misspelt_option_of_the_command_line_shows_no_secret(capsys):
    with pytest.raises(SystemExit) as end:
        main(["watch", "--bsu", f"redis://:{SECRET}@host:6379", f"redis://:{SECRET}#@host"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--bsu" in said
    assert SECRET not in said


@pytest.mark.parametrize("address", ["http://x", "redis://localhost:port", "rediss://:x#y@host"])
def test_the_command_line_shows_the_remedy_of_a_wrong_address(address, capsys):
    with pytest.raises(BusAddressError) as caught:
        parse_address(address)
    assert main(["send", "pause", "--bus", address]) == 1
    said = capsys.readouterr().err
    assert str(caught.value) in said
    assert "redis://127.0.0.1:6379/0, rediss://host:6379/0, unix:///path/to/redis.sock" in said


@pytest.mark.parametrize(
    "text",
    [
        "it does not begin with redis://, rediss:// or unix://; write one",
        "write one like redis://localhost:6379/0, rediss://host:6379/0; unix:///a/b.sock.",
        "invalid choice: 'redis://localhost:6379/0' (choose redis://[::1]:6379)",
        "redis://host:6379?db=2, not",
    ],
)
def test_what_holds_no_secret_stays_readable(text):
    assert hide_addresses(text) == text.replace("?db=2", "/2")


SECRETIVE = [
    url.strip()
    for url in (*GOOD, *BAD)
    if re.match(r"\s*(rediss?|unix):/", url, re.IGNORECASE) and not re.search(r"\S\s", url.strip())
]
"""Addresses without a blank: nobody can tell where one with a blank ends."""


@pytest.mark.parametrize("end", [",", ";", ".", "'", '"', "`", ")", "),", "', @", ", x@host", " y"])
@pytest.mark.parametrize("url", SECRETIVE, ids=range(len(SECRETIVE)))
def test_no_sentence_around_an_address_shows_a_secret(url, end):
    assert SECRET not in hide_addresses(f"unknown '{url}{end}")
    assert SECRET not in hide_addresses(f"{url}{end} then redis://:x@host:1{end}")
    if end not in {".", " y"}:  # else it is the name of a host
        assert SECRET not in hide_addresses(f"redis://{SECRET}{end}")


def test_a_server_that_refuses_shows_no_secret():
    with bus.PrivateServer() as server:
        for url, words in (
            (f"{server.url}?db=99", "has no such database"),
            (f"{server.url}?password={SECRET}", "user or password"),
            (f"{server.url}?username=nobody&password={SECRET}", "user or password"),
        ):
            with pytest.raises(EsperError, match=words) as caught:
                bus.connect(url, run="r", keys=bus.NO_KEYS)
            _check_hidden(caught.value)


KEY = "ab" * 32


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"first={KEY}",
        f"{KEY}:first",
        f"{KEY}:",
        f":{KEY}",
        f"first:{KEY}x",
        f"a b:{KEY},{KEY}",
    ],
)
def test_a_key_that_is_written_wrongly_is_not_shown(text):
    with pytest.raises(EsperError) as caught:
        bus.read_keys({"ESPER_BUS_KEYS": text})
    assert KEY not in str(caught.value)
    assert "id:hex" in str(caught.value)


@pytest.mark.parametrize("content", [b"first:\xff\xfe", b"first:00" * 2**16])
def test_a_file_that_holds_no_keys_is_refused_in_words(content, tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(EsperError, match="no file of keys"):
        bus.read_keys({"ESPER_BUS_KEY_FILE": str(path)})
