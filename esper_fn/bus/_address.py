"""Addresses of a bus, and who can reach them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import parse_qsl, quote, unquote

from esper_fn._arguments import describe
from esper_fn.errors import BusAddressError, BusSecurityError

MEMORY = "memory"
_EXAMPLES = "memory, redis://127.0.0.1:6379/0, rediss://host:6379/0, unix:///path/to/redis.sock"
_HIDDEN = "***"
_SECRETS = ("username", "password", "ssl_password")
_PLAIN_OPTIONS = ("db", "username", "password", "client_name")
_TLS_OPTIONS = (
    "ssl_cert_reqs", "ssl_check_hostname", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile",
    "ssl_keyfile", "ssl_password",
)  # fmt: skip
_OWN_OPTIONS = (
    "protocol", "decode_responses", "encoding", "encoding_errors", "socket_timeout",
    "socket_connect_timeout", "socket_keepalive", "retry_on_timeout", "retry_on_error",
    "max_connections", "health_check_interval", "timeout", "single_connection_client",
)  # fmt: skip
"""Options of Redis clients that the bus chooses itself."""
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_ADDRESS = re.compile(r"\b(rediss?|unix)(:/\S*)", re.IGNORECASE)
_STOPS = ",;.'\"`)"
"""Characters that may follow an address in a sentence."""
_HAS_PORT = re.compile(r"\w+://[^/?]*:\d+([/?].*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A checked address. Its `repr` and `shown` contain neither user nor password.

    Attributes:
      url: the address itself; it may contain a password.
      is_memory: whether the bus is inside this process.
      is_local: whether only this machine can reach the address.
      shown: the address for people.
      options: host, port, path, database, user, password and TLS, named as in redis-py.
    """

    url: str = field(repr=False)
    is_memory: bool
    is_local: bool
    shown: str
    options: tuple[tuple[str, Any], ...] = field(default=(), repr=False)

    def hide(self, text: str) -> str:
        """Removes user and password of this address from a text, as some servers repeat them."""
        for name, value in self.options:
            if name in _SECRETS and len(value) > 1:
                text = text.replace(value, _HIDDEN)
        return text


def hide_addresses(text: str) -> str:
    """Replaces each address in a text by `Address.shown`, or by its scheme alone.

    The characters behind an address may be a piece of a password. They are shown only if the scheme
    stands alone, or if the address is complete with a port and no @ follows.

    >>> hide_addresses("no option --bsu redis://:hunter2@host:6379/0")
    'no option --bsu redis://***@host:6379/0'
    >>> hide_addresses("write one like redis://localhost:6379/0, or unix://, not redis://hunter2,")
    'write one like redis://localhost:6379/0, or unix://, not redis://***'
    """

    def shown(match: re.Match[str]) -> str:
        whole = match[0]
        try:
            return parse_address(whole).shown
        except BusAddressError:
            pass
        bare = whole.rstrip(_STOPS)
        if bare == f"{match[1]}://":
            return whole
        if _HAS_PORT.fullmatch(bare) and "@" not in text[match.end() :]:
            with suppress(BusAddressError):
                return parse_address(bare).shown + whole[len(bare) :]
        return f"{match[1]}://{_HIDDEN}"

    return _ADDRESS.sub(shown, text)


def parse_address(url: str) -> Address:
    """Parses an address.

    Args:
      url: `redis://USER:PASSWORD@HOST:PORT/DB`, `rediss://` for TLS, `unix:///PATH`, or `memory`.
        Percent-encode `/ ? # %` and blanks in its parts. Options after `?` are `db`, `username`,
        `password`, `client_name`, and with `rediss` the `ssl_...` options of redis-py.

    Raises:
      TypeError: `url` is not a string.
      BusAddressError: `url` is not an address. The message names the wrong part without its text,
        which is often a misplaced password.
    """
    if not isinstance(url, str):
        raise TypeError(
            f"the address of a bus must be a string, got {describe(url)}; write one like "
            f"{_EXAMPLES}"
        )
    url = url.strip()
    if url in {MEMORY, f"{MEMORY}://"}:
        return Address(url=url, is_memory=True, is_local=True, shown=MEMORY)
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in {"redis", "rediss", "unix"}:
        _refuse("it does not begin with redis://, rediss:// or unix://")
    if any(not char.isprintable() or char.isspace() for char in rest):
        _refuse("it holds a blank or a control character; write a blank as %20")
    if "#" in rest:
        _refuse("it holds a #; write it as %23, in a password too")
    if scheme == "unix":
        location, options = _unix(rest)
    else:
        location, options = _network(rest)
    known = (*_PLAIN_OPTIONS, *_TLS_OPTIONS) if scheme == "rediss" else _PLAIN_OPTIONS
    for name, value in _query(rest, known):
        if name in options and options[name] != value:
            _refuse(f"{name} is given twice; leave one out")
        options[name] = value
    if scheme == "rediss":
        options.setdefault("ssl_cert_reqs", "required")
    shown_user = f"{_HIDDEN}@" if options.keys() & set(_SECRETS) else ""
    shown_db = f"/{options['db']}" if "db" in options else ""
    if scheme == "unix":
        shown = f"unix://{shown_user}{location}" + (f"?db={options['db']}" if shown_db else "")
    else:
        shown = f"{scheme}://{shown_user}{location}{shown_db}"
    return Address(
        url=url,
        is_memory=False,
        is_local=scheme == "unix" or is_loopback(options["host"]),
        shown=shown,
        options=tuple(options.items()),
    )


def _refuse(problem: str) -> NoReturn:
    raise BusAddressError(f"bus address: {problem}; write one like {_EXAMPLES}") from None


def _unix(rest: str) -> tuple[str, dict[str, Any]]:
    """The path of the socket, and the options before the `?`."""
    before = rest.partition("?")[0]
    user = ""
    if before.startswith("//"):
        authority, slash, path = before[2:].partition("/")
        if authority and not authority.endswith("@"):
            _refuse("between unix:// and the path stands something; the path begins with a third /")
        user, path = authority[:-1], slash + path
    else:
        path = before
    path = unquote(path)
    if not path.startswith("/") or len(path) < 2 or not path.isprintable():
        _refuse("the path of the socket is missing or not absolute")
    return quote(path, safe="/@:+,=~"), {"path": path, **_user(user)}


def _network(rest: str) -> tuple[str, dict[str, Any]]:
    """Host and port for people, and the options before the `?`."""
    if not rest.startswith("//"):
        _refuse("after the scheme comes //")
    before = rest[2:].partition("?")[0]
    authority, _, path = before.partition("/")
    if "@" in rest[2 + len(authority) :]:
        _refuse(
            "an @ stands after the host; in a user or password write / as %2F and ? as %3F, in an "
            "option write @ as %40"
        )
    user, _, where = authority.rpartition("@")
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]*)(?::([^:]*))?", where)
    if match is None:
        _refuse("host and port are not HOST:PORT; an IPv6 address stands in [ ]")
    host, port = match[1], match[2]
    if host.startswith("["):
        host = unquote(host[1:-1])
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            _refuse("what stands in [ ] is no IPv6 address")
    elif not host or not all(char.isalnum() or char in "._-" for char in host):
        _refuse("the host is missing, or holds something other than letters, digits, . _ and -")
    options: dict[str, Any] = {"host": host, "port": 6379}
    if port is not None:
        options["port"] = _whole(port, "the port", 1, 65_535)
    if path:
        options["db"] = _whole(path.removesuffix("/"), "the database after the host", 0, 2**31 - 1)
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{options['port']}", {**options, **_user(user)}


def _user(text: str) -> dict[str, Any]:
    name, _, password = text.partition(":")
    both = {"username": unquote(name), "password": unquote(password)}
    return {key: value for key, value in both.items() if value}


def _query(rest: str, known: tuple[str, ...]) -> list[tuple[str, Any]]:
    options = []
    seen = set()
    for name, value in parse_qsl(rest.partition("?")[2], keep_blank_values=True):
        if name in _OWN_OPTIONS:
            _refuse(f"option {name!r} is chosen by the bus itself; leave it out")
        if name in _TLS_OPTIONS and name not in known:
            _refuse(f"option {name!r} belongs to TLS; begin the address with rediss://")
        if name not in known:
            # An option without a value, or with a strange name, may be a piece of a password.
            which = f"option {name!r}" if name.isidentifier() and value else "an option"
            _refuse(f"{which} is unknown; there are {', '.join(known)}")
        if name in seen:
            _refuse(f"option {name!r} is given twice; leave one out")
        seen.add(name)
        if not value:
            _refuse(f"option {name!r} has no value")
        options.append((name, _option(name, value)))
    return options


def _option(name: str, value: str) -> Any:
    if name == "db":
        return _whole(value, "option 'db'", 0, 2**31 - 1)
    if name == "ssl_cert_reqs" and value not in {"none", "optional", "required"}:
        _refuse("option 'ssl_cert_reqs' must be none, optional or required")
    if name == "ssl_check_hostname":
        if value.lower() not in _WORDS:
            _refuse("option 'ssl_check_hostname' must be true or false")
        return _WORDS[value.lower()]
    return value


def _whole(text: str, what: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and least <= int(text) <= most):
        _refuse(f"{what} must be a whole number from {least} to {most}")
    return int(text)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and no other.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_reach(address: Address, settings: Mapping[str, str], *, has_key: bool) -> None:
    """Checks that a bus without a key can be reached from this machine only.

    Args:
      address: address of the server.
      settings: its settings `bind`, `protected-mode`, `port` and `requirepass`; empty if it hides
        them.
      has_key: whether messages are signed.

    Raises:
      BusSecurityError: other machines can reach the server, and there is no key.
    """
    if has_key:
        return
    remedy = (
        "set ESPER_BUS_KEYS to `id:hex` here and wherever commands are sent from "
        "(`esper bus-key` makes one), or bind the server to 127.0.0.1"
    )
    if not address.is_local:
        raise BusSecurityError(
            f"bus {address.shown} can be reached from other machines, and no key is set; {remedy}"
        )
    bound = settings.get("bind")
    if bound is None or settings.get("port") == "0":
        return
    hosts = [host.removeprefix("-") for host in bound.split()] or ["*"]
    is_guarded = settings.get("protected-mode") == "yes" and not settings.get("requirepass")
    if not is_guarded and not all(is_loopback(host) for host in hosts):
        raise BusSecurityError(
            f"the server at {address.shown} listens on {bound or 'every interface'}, so other "
            f"machines can reach it, and no key is set; {remedy}"
        )
