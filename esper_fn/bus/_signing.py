"""Signatures: HMAC-SHA256 over the bytes of an entry.

    signature = key_id || "." || HMAC-SHA256(key, "esper-bus 1" 0 stream 0 key_id 0 payload)

The signature covers the name of the stream, so a message cannot be moved to another stream. The
payload holds the format of the envelope and the version of each message.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from esper_fn.errors import BusSecurityError, ForgedError

_MIN_KEY_BYTES = 16
_MAC_BYTES = 32
_LONGEST_SIGNATURE = 64 + 1 + _MAC_BYTES
_MAX_KEY_FILE_BYTES = 64 * 1024
_PAIR = re.compile(r"([A-Za-z_]\w*):((?:[0-9A-Fa-f]{2})+)", re.ASCII)
KEYS_VARIABLE = "ESPER_BUS_KEYS"
KEY_FILE_VARIABLE = "ESPER_BUS_KEY_FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Keyring:
    """The keys of one side.

    To rotate keys, add the new one everywhere, make it active everywhere, and remove the old one.

    Args:
      active: id of the key that signs; with None nothing is signed and everything is accepted.
      keys: keys by id, of at least 16 bytes; each of them verifies.

    Raises:
      BusSecurityError: a key is too short, an id is not valid, or the active key is missing.
    """

    active: str | None = None
    keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for key_id, key in self.keys.items():
            if not (key_id.isascii() and key_id.isidentifier() and len(key_id) <= 64):
                raise BusSecurityError(
                    f"key id {key_id!r} must be letters, digits and _, at most 64"
                )
            if len(key) < _MIN_KEY_BYTES:
                raise BusSecurityError(
                    f"key {key_id!r} has {len(key)} bytes; at least {_MIN_KEY_BYTES}; "
                    "`python -c 'import secrets; print(secrets.token_hex(32))'` makes one"
                )
        if self.active not in self.keys and (self.keys or self.active is not None):
            raise BusSecurityError(
                f"active={self.active!r} must name the key that signs; there are "
                f"{sorted(self.keys)}"
            )

    @property
    def is_required(self) -> bool:
        """Whether messages must be signed."""
        return bool(self.keys)

    def sign(self, stream: str, payload: bytes) -> bytes:
        """Signs a payload for a stream; the signature is empty without a key."""
        if self.active is None:
            return b""
        name = self.active.encode()
        return name + b"." + _mac(self.keys[self.active], stream, name, payload)

    def verify(self, stream: str, payload: bytes, signature: bytes) -> None:
        """Verifies a signature in constant time; without keys, it accepts everything.

        Raises:
          ForgedError: the signature is missing or wrong.
        """
        if not self.keys:
            return
        if not signature:
            raise ForgedError("the message is not signed, and this side requires it")
        name, dot, mac = signature.partition(b".")
        key = self.keys.get(name.decode("ascii", "replace")) if dot else None
        if key is None or len(signature) > _LONGEST_SIGNATURE:
            raise ForgedError(f"signed with a key that is not held here ({name[:16]!r})")
        # Bytes of any length compare in constant time; a truncated one is unequal.
        if not hmac.compare_digest(_mac(key, stream, name, payload), mac):
            raise ForgedError(f"the signature by key {name.decode()!r} does not hold")


NO_KEYS = Keyring()
"""Signs nothing and accepts everything, for a bus that only this machine can reach."""


def read_keys(environment: Mapping[str, str] | None = None) -> Keyring:
    """Reads the keys in `$ESPER_BUS_KEYS`, or in the file that `$ESPER_BUS_KEY_FILE` names.

    Both hold pairs `id:hex`, separated by commas or lines; the first key signs.

    Args:
      environment: the variables; by default those of this process.

    Raises:
      BusSecurityError: the pairs are not valid, or other users may read the file.
    """
    environment = os.environ if environment is None else environment
    text, origin = environment.get(KEYS_VARIABLE, ""), f"${KEYS_VARIABLE}"
    if not text and (path := environment.get(KEY_FILE_VARIABLE)):
        origin = path
        text = _read_key_file(Path(path))
    keys: dict[str, bytes] = {}
    for number, part in enumerate(text.replace(",", "\n").split(), 1):
        if (match := _PAIR.fullmatch(part)) is None:
            # Either half may hold a key, so neither is shown.
            raise BusSecurityError(
                f"{origin}: pair {number} must be written id:hex, as in first:00ff...; the id is "
                "letters, digits and _"
            )
        keys[match[1]] = bytes.fromhex(match[2])
    return Keyring(active=next(iter(keys), None), keys=keys)


def _read_key_file(path: Path) -> str:
    with open(path, "rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise BusSecurityError(f"{path} may be read by others; chmod 600 it")
        data = file.read(_MAX_KEY_FILE_BYTES + 1)
    if len(data) > _MAX_KEY_FILE_BYTES or not data.isascii():
        raise BusSecurityError(
            f"{path} is no file of keys: it holds one id:hex a line, at most "
            f"{_MAX_KEY_FILE_BYTES} bytes of ASCII"
        )
    return data.decode("ascii")


def new_key(key_id: str = "first") -> str:
    """Makes a random key, in the form that `read_keys` reads."""
    return f"{key_id}:{secrets.token_hex(32)}"


def _mac(key: bytes, stream: str, name: bytes, payload: bytes) -> bytes:
    covered = b"esper-bus 1\0" + stream.encode() + b"\0" + name + b"\0" + payload
    return hmac.digest(key, covered, "sha256")
