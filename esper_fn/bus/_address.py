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
_WORDS: dict[str, dict[str, Any]] = {
    "ssl_cert_reqs": {"none": "none", "optional": "optional", "required": "required"},
    "ssl_check_hostname": {
        "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False,
    },
}  # fmt: skip
"""Options that take certain words only, and what these stand for."""
_ADDRESS = re.compile(r"\b(rediss?|unix)(:/\S*)", re.IGNORECASE)
_STOPS = ",;.'\"`)"
"""Characters that may follow an address in a sentence."""
_HAS_PORT = re.compile(r"\w+://[^/?]*:\d+([/?].*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A checked address. Its `repr` and `shown` contain neither user nor password.

    Attributes:
      is_memory: whether the bus is inside this process.
      is_local: whether only this machine can reach the address.
      shown: the address for people.
      options: host, port, path, database, user, password and TLS, named as in redis-py.
    """

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
        bare = whole.rstrip(_STOPS)
        if bare == f"{match[1]}://":
            return whole
        is_complete = _HAS_PORT.fullmatch(bare) and "@" not in text[match.end() :]
        for part in (whole, bare) if is_complete else (whole,):
            with suppress(BusAddressError):
                return parse_address(part).shown + whole[len(part) :]
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
        return Address(is_memory=True, is_local=True, shown=MEMORY)
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in {"redis", "rediss", "unix"}:
        _refuse("it does not begin with redis://, rediss:// or unix://")
    if any(not char.isprintable() or char.isspace() for char in rest):
        _refuse("it holds a blank or a control character; write a blank as %20")
    if "#" in rest:
        _refuse("it holds a #; write it as %23, in a password too")
    before, _, query = rest.partition("?")
    is_unix = scheme == "unix"
    location, options = _unix(before) if is_unix else _network(before, query)
    known = (*_PLAIN_OPTIONS, *_TLS_OPTIONS) if scheme == "rediss" else _PLAIN_OPTIONS
    for name, text in parse_qsl(query, keep_blank_values=True):
        value = _option(name, text, known)
        if options.setdefault(name, value) != value:
            _refuse(f"{name} is given twice; leave one out")
    if scheme == "rediss":
        options.setdefault("ssl_cert_reqs", "required")
    user = f"{_HIDDEN}@" if options.keys() & set(_SECRETS) else ""
    shown = f"{scheme}://{user}{location}"
    if "db" in options:
        shown += f"?db={options['db']}" if is_unix else f"/{options['db']}"
    return Address(
        is_memory=False,
        is_local=is_unix or is_loopback(options["host"]),
        shown=shown,
        options=tuple(options.items()),
    )


def _refuse(problem: str) -> NoReturn:
    raise BusAddressError(f"bus address: {problem}; write one like {_EXAMPLES}") from None


def _unix(before: str) -> tuple[str, dict[str, Any]]:
    """The path of the socket, and the options before the `?`."""
    user, path = "", before
    if before.startswith("//"):
        authority, slash, path = before[2:].partition("/")
        if authority and not authority.endswith("@"):
            _refuse("between unix:// and the path stands something; the path begins with a third /")
        user, path = authority[:-1], slash + path
    path = unquote(path)
    if not path.startswith("/") or len(path) < 2 or not path.isprintable():
        _refuse("the path of the socket is missing or not absolute")
    return quote(path, safe="/@:+,=~"), {"path": path, **_user(user)}


def _network(before: str, query: str) -> tuple[str, dict[str, Any]]:
    """Host and port for people, and the options before the `?`."""
    if not before.startswith("//"):
        _refuse("after the scheme comes //")
    authority, _, path = before[2:].partition("/")
    if "@" in path + query:
        _refuse(
            "an @ stands after the host; in a user or password write / as %2F and ? as %3F, in an "
            "option write @ as %40"
        )
    user, _, where = authority.rpartition("@")
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]*)(?::([^:]*))?", where)
    if match is None:
        _refuse("host and port are not HOST:PORT; an IPv6 address stands in [ ]")
    host, port = match.groups("6379")
    shown = host
    if host.startswith("["):
        host = unquote(host[1:-1])
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            _refuse("what stands in [ ] is no IPv6 address")
        shown = f"[{host}]"
    elif not host or not all(char.isalnum() or char in "._-" for char in host):
        _refuse("the host is missing, or holds something other than letters, digits, . _ and -")
    options = {"host": host, "port": _whole(port, "the port", 1, 65_535), **_user(user)}
    if path:
        options["db"] = _whole(path.removesuffix("/"), "the database after the host", 0, 2**31 - 1)
    return f"{shown}:{options['port']}", options


def _user(text: str) -> dict[str, Any]:
    name, _, password = text.partition(":")
    both = {"username": unquote(name), "password": unquote(password)}
    return {key: value for key, value in both.items() if value}


def _option(name: str, value: str, known: tuple[str, ...]) -> Any:
    if name in _TLS_OPTIONS and name not in known:
        _refuse(f"option {name!r} belongs to TLS; begin the address with rediss://")
    if name not in known:
        # An option without a value, or with a strange name, may be a piece of a password.
        which = f"option {name!r}" if name.isidentifier() and value else "an option"
        _refuse(f"{which} is unknown; there are {', '.join(known)}")
    if not value:
        _refuse(f"option {name!r} has no value")
    if name == "db":
        return _whole(value, "option 'db'", 0, 2**31 - 1)
    words = _WORDS.get(name, {value.lower(): value})
    if value.lower() not in words:
        _refuse(f"option {name!r} must be one of {', '.join(words)}")
    return words[value.lower()]


def _whole(text: str, what: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and least <= int(text) <= most):
        _refuse(f"{what} must be a whole number from {least} to {most}")
    return int(text)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and no other.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
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
