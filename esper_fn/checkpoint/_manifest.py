"""The manifest: what a step consists of, byte for byte; written last.

Two lines. The first is the content, the second its seal: SHA-256 of the first line's bytes, and an
HMAC-SHA256 of them where there is a key.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from esper_fn.checkpoint._files import MAX_FILES, is_safe
from esper_fn.checkpoint._json import corrupt_if_malformed, dumps, loads
from esper_fn.checkpoint._leaf import Leaf, leaf_from_json, leaf_to_json
from esper_fn.checkpoint._structure import MAX_LEAVES
from esper_fn.errors import CheckpointError, CorruptCheckpointError

NAME = "manifest.jsonl"
RECORD = "record.json"
FORMAT = "esper-fn checkpoint"
VERSION = 1
MAX_BYTES = 256 * 2**20
MAX_STEP = 10**12 - 1
PACKED = "packed"
_SEAL = b"esper-fn checkpoint manifest\n"


class FileInfo(NamedTuple):
    """Size and digest of one file."""

    num_bytes: int
    sha256: str


class Part(NamedTuple):
    """Leaves that lie in one folder of Orbax's.

    Attributes:
      folder: below the step's, named by content, so that equal parts have equal names.
      leaves: index of each leaf, and where it begins in the array `packed`, or -1 where it is the
        array `leaf{position in this tuple}`.
    """

    folder: str
    leaves: tuple[tuple[int, int], ...]


class Manifest(NamedTuple):
    """One step on disk, or about to be.

    Attributes:
      step: training steps done.
      structure: of the value, as JSON.
      leaves: of the value, with their digests once it is on disk.
      metrics: finite numbers for retention.
      run: identity of the folder the step belongs to.
      parts: where the leaves' arrays lie.
      files: every file of the step but the manifest.
      versions: of what wrote it.
      is_signed: whether it has an HMAC.
    """

    step: int
    structure: Any
    leaves: tuple[Leaf, ...]
    metrics: Mapping[str, float]
    run: str = ""
    parts: tuple[Part, ...] = ()
    files: Mapping[str, FileInfo] = MappingProxyType({})
    versions: Mapping[str, str] = MappingProxyType({})
    is_signed: bool = False


def encode(manifest: Manifest, key: bytes | None) -> bytes:
    """Writes a manifest and its seal.

    Args:
      manifest: of a step.
      key: for an HMAC, or None.

    Returns:
      The bytes of the file.

    Raises:
      CheckpointError: more than `MAX_BYTES`.
    """
    rows = manifest._asdict() | {
        "leaves": list(map(leaf_to_json, manifest.leaves)),
        "parts": [part._asdict() for part in manifest.parts],
    }
    del rows["is_signed"]
    content_line = dumps({"format": FORMAT, "version": VERSION, **rows})
    data = content_line + b"\n" + dumps(_seal(content_line, key)) + b"\n"
    if len(data) > MAX_BYTES:
        raise CheckpointError(
            f"the manifest takes {len(data)} bytes, at most {MAX_BYTES} are read back; stack leaves"
        )
    return data


def _seal(content_line: bytes, key: bytes | None) -> dict[str, str]:
    seal = {"sha256": hashlib.sha256(content_line).hexdigest()}
    if key is not None:
        seal["hmac_sha256"] = hmac.new(key, _SEAL + content_line, "sha256").hexdigest()
    return seal


def decode(data: bytes, key: bytes | None) -> Manifest:
    """Checks the seal, then reads.

    Args:
      data: the file.
      key: for the HMAC, which is required then; without a key only the SHA-256 is checked, which
        finds damage but no forgery.

    Raises:
      CorruptCheckpointError: damaged, forged, or not of the form.
      CheckpointError: of a newer format than this version reads.
    """
    lines = data.split(b"\n")
    if len(lines) != 3 or lines[2] != b"":
        raise CorruptCheckpointError("it is not two lines")
    content_line, seal_line = lines[0], lines[1]
    with corrupt_if_malformed("its seal"):
        seal = loads(seal_line, max_bytes=1024)
    _require(isinstance(seal, dict) and seal.keys() <= {"sha256", "hmac_sha256"}, "its seal")
    if key is not None and "hmac_sha256" not in seal:
        raise CorruptCheckpointError("it has no HMAC, but a key is given")
    for name, digest in _seal(content_line, key).items():
        value = seal.get(name)
        if not _is_digest(value) or not hmac.compare_digest(str(value), digest):
            raise CorruptCheckpointError(f"its {name.replace('_', '-')} does not match")
    _require(dumps(seal) == seal_line, "its seal")
    with corrupt_if_malformed("its content has another form"):
        content = loads(content_line, max_bytes=MAX_BYTES)
        _check_version(content)
        return _parse(content, is_signed="hmac_sha256" in seal)


def _require(is_met: bool, name: str) -> None:
    if not is_met:
        raise CorruptCheckpointError(f"{name} has another form than a manifest's")


def _check_version(content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CorruptCheckpointError(f"it is not an {FORMAT}'s")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise CorruptCheckpointError(f"version {version!r}")
    if version > VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {version}, this version of esper-fn reads up to "
            f"{VERSION}; install the one that wrote it, or a newer one"
        )


def _parse(content: dict[str, Any], *, is_signed: bool) -> Manifest:
    run, step, rows = content["run"], content["step"], content["leaves"]
    metrics, versions, files = content["metrics"], content["versions"], _files(content["files"])
    _require(isinstance(run, str) and 0 < len(run) <= 64, "its run")
    _require(type(step) is int and 0 <= step <= MAX_STEP, "its step")
    _require(isinstance(rows, list) and len(rows) <= MAX_LEAVES, "its list of leaves")
    leaves = tuple(map(leaf_from_json, rows))
    _require(
        all(leaf.sha256 is None if leaf.is_scalar else _is_digest(leaf.sha256) for leaf in leaves),
        "the digest of a leaf",
    )
    _require(isinstance(metrics, dict) and all(map(_is_number, metrics.values())), "its metrics")
    _require(all(isinstance(text, str) for text in versions.values()), "its list of versions")
    return Manifest(
        run=run,
        step=step,
        structure=content["structure"],
        leaves=leaves,
        parts=_parts(content["parts"], leaves, files),
        files=files,
        metrics=metrics,
        versions=versions,
        is_signed=is_signed,
    )


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _files(content: dict[str, list[Any]]) -> dict[str, FileInfo]:
    _require(len(content) <= MAX_FILES, "its list of files")
    files = {}
    for path, (size, digest) in content.items():
        if not is_safe(path) or path == NAME:
            raise CorruptCheckpointError(f"it lists a file {path[:80]!r}, which no step has")
        _require(type(size) is int and 0 <= size < 2**62, f"the size of {path!r}")
        _require(_is_digest(digest), f"the digest of {path!r}")
        files[path] = FileInfo(num_bytes=size, sha256=digest)
    return files


def _parts(
    content: list[Any], leaves: Sequence[Leaf], files: Mapping[str, FileInfo]
) -> tuple[Part, ...]:
    parts: list[Part] = []
    used: list[int] = []
    for row in content:
        folder, pairs = row["folder"], row["leaves"]
        _require(is_safe(folder), "a part")
        if not any(path.startswith(f"{folder}/") for path in files):
            raise CorruptCheckpointError(f"part {folder!r} has no files")
        for index, offset in pairs:
            _require(type(index) is int and type(offset) is int, "the position of a leaf")
            if not 0 <= index < len(leaves) or not -1 <= offset < 2**40:
                raise CorruptCheckpointError("the position of a leaf is impossible")
            used.append(index)
        parts.append(Part(folder=folder, leaves=tuple((index, offset) for index, offset in pairs)))
    if sorted(used) != [index for index, leaf in enumerate(leaves) if not leaf.is_scalar]:
        raise CorruptCheckpointError("its parts do not hold its leaves, each once")
    return tuple(parts)
