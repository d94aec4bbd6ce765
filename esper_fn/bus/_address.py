"""Where a bus is, and who else could reach it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from esper_fn.errors import BusAddressError, BusSecurityError

MEMORY = "memory"
_EXAMPLES = "memory, redis://127.0.0.1:6379/0, rediss://host:6379/0, unix:///path/to/redis.sock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A checked address.

    Attributes:
      url: as given.
      is_memory: the bus is inside this process.
      is_local: only this machine can reach it, by the address alone.
    """

    url: str
    is_memory: bool
    is_local: bool

    @property
    def shown(self) -> str:
        """The address without a password."""
        parts = urlsplit(self.url)
        if parts.password is None:
            return self.url
        return self.url.replace(f":{parts.password}@", ":***@", 1)


def parse_address(url: str) -> Address:
    """Reads an address.

    Raises:
      BusAddressError: it is none.
    """
    if url in {MEMORY, f"{MEMORY}://"}:
        return Address(url=url, is_memory=True, is_local=True)
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme == "unix" and parts.path:
        return Address(url=url, is_memory=False, is_local=True)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname or port == -1:
        raise BusAddressError(f"bus address {url!r} is none; write one like {_EXAMPLES}")
    return Address(url=url, is_memory=False, is_local=is_loopback(parts.hostname))


def is_loopback(host: str) -> bool:
    """Whether a name or number of a host is this machine and no other.

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
    """Refuses a bus that other machines can reach, without a key.

    Args:
      address: where it is.
      settings: what the server says of `bind`, `protected-mode`, `port` and `requirepass`; empty
        where it does not tell.
      has_key: messages are signed.

    Raises:
      BusSecurityError: anyone who reaches it could command.
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
