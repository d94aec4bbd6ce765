"""The manifest: what a step consists of, byte for byte; written last.

Two lines. The first is the content, the second its seal: SHA-256 of the first line's bytes, and an
HMAC-SHA256 of them where there is a key.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper_fn.checkpoint._files import MAX_FILES, is_safe
from esper_fn.checkpoint._json import dumps, loads
from esper_fn.checkpoint._structure import MAX_LEAVES, Leaf, leaf_from_json, leaf_to_json
from esper_fn.errors import CheckpointError, CorruptCheckpointError

NAME = "manifest.jsonl"
RECORD = "record.json"
FORMAT = "esper-fn checkpoint"
VERSION = 3
MAX_BYTES = 256 * 2**20
MAX_STEP = 10**12 - 1
PACKED = "packed"
_SEAL = b"esper-fn checkpoint manifest\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """Size and digest of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Leaves that lie in one folder of Orbax's.

    Attributes:
      folder: below the step's, named by content, so that equal parts have equal names.
      leaves: index of each leaf, and where it begins in the array `packed`, or -1 where it is the
        array `leaf{position in this tuple}`.
    """

    folder: str
    leaves: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One step on disk.

    Attributes:
      run: identity of the folder the step belongs to.
      step: training steps done.
      structure: of the value, as JSON.
      leaves: of the value.
      digests: SHA-256 of each leaf's bytes; None where version 1 did not keep it.
      parts: where the leaves' arrays lie.
      files: every file of the step but the manifest.
      metrics: finite numbers for retention.
      versions: of what wrote it.
      is_signed: whether it has an HMAC.
    """

    run: str
    step: int
    structure: Any
    leaves: tuple[Leaf, ...]
    digests: tuple[str | None, ...]
    parts: tuple[Part, ...]
    files: Mapping[str, FileInfo]
    metrics: Mapping[str, float]
    versions: Mapping[str, str]
    is_signed: bool = False

    @property
    def num_array_bytes(self) -> int:
        """Memory that all arrays take."""
        return sum(leaf.num_bytes for leaf in self.leaves)


def encode(manifest: Manifest, key: bytes | None) -> bytes:
    """The file's bytes."""
    content_line = dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "run": manifest.run,
            "step": manifest.step,
            "structure": manifest.structure,
            "leaves": [
                leaf_to_json(leaf) | {"sha256": digest}
                for leaf, digest in zip(manifest.leaves, manifest.digests, strict=True)
            ],
            "parts": [
                {"folder": part.folder, "leaves": [list(place) for place in part.leaves]}
                for part in manifest.parts
            ],
            "files": {path: [of.num_bytes, of.sha256] for path, of in manifest.files.items()},
            "metrics": dict(manifest.metrics),
            "versions": dict(manifest.versions),
        }
    )
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
    try:
        seal = loads(seal_line, max_bytes=1024)
    except ValueError as error:
        raise CorruptCheckpointError(f"its seal: {error}") from None
    wanted = _seal(content_line, key)
    if not isinstance(seal, dict) or seal.keys() - {"sha256", "hmac_sha256"}:
        raise CorruptCheckpointError("its seal has another form")
    if key is not None and "hmac_sha256" not in seal:
        raise CorruptCheckpointError("it has no HMAC, but a key is given")
    for name, digest in wanted.items():
        said = seal.get(name)
        if not _is_digest(said) or not hmac.compare_digest(str(said), digest):
            raise CorruptCheckpointError(f"its {name.replace('_', '-')} does not match")
    if dumps(seal) != seal_line:
        raise CorruptCheckpointError("its seal has another form")
    try:
        content = loads(content_line, max_bytes=MAX_BYTES)
    except ValueError as error:
        raise CorruptCheckpointError(f"it is no JSON of ours: {error}") from None
    try:
        return _parse(_migrated(content), is_signed="hmac_sha256" in seal)
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"its content has another form: {error}") from error


def _migrated(content: Any) -> dict[str, Any]:
    """The content as the present version would have written it."""
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
    for old in range(version, VERSION):
        content = _MIGRATIONS[old](content)
    return content


def _from_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 kept no digests of leaves, no metrics and no versions."""
    leaves = content.get("leaves")
    if not isinstance(leaves, list) or not all(isinstance(leaf, dict) for leaf in leaves):
        raise CorruptCheckpointError("its leaves have another form")
    return {
        **content,
        "version": 2,
        "leaves": [leaf | {"sha256": None} for leaf in leaves],
        "metrics": {},
        "versions": {},
    }


def _from_2(content: dict[str, Any]) -> dict[str, Any]:
    """Version 2 had dictionaries with strings for keys only."""
    return {**content, "version": 3}


_MIGRATIONS = {1: _from_1, 2: _from_2}


def _parse(content: dict[str, Any], *, is_signed: bool) -> Manifest:
    run, step = content.get("run"), content.get("step")
    if not isinstance(run, str) or not 0 < len(run) <= 64:
        raise CorruptCheckpointError("its run has no name")
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CorruptCheckpointError("its step is no number")
    rows, metrics, versions = (content.get(name) for name in ("leaves", "metrics", "versions"))
    if not isinstance(rows, list) or len(rows) > MAX_LEAVES:
        raise CorruptCheckpointError("its leaves have another form")
    leaves, digests = [], []
    for row in rows:
        if not isinstance(row, dict):
            raise CorruptCheckpointError("a leaf has another form")
        digest = row.get("sha256")
        if digest is not None and not _is_digest(digest):
            raise CorruptCheckpointError("the digest of a leaf has another form")
        digests.append(digest)
        leaves.append(leaf_from_json({k: v for k, v in row.items() if k != "sha256"}))
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        raise CorruptCheckpointError("its metrics are no numbers")
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise CorruptCheckpointError("its versions have another form")
    files = _files(content.get("files"))
    return Manifest(
        run=run,
        step=step,
        structure=content.get("structure"),
        leaves=tuple(leaves),
        digests=tuple(digests),
        parts=_parts(content.get("parts"), leaves, files),
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


def _files(content: Any) -> dict[str, FileInfo]:
    if not isinstance(content, dict) or len(content) > MAX_FILES:
        raise CorruptCheckpointError("its files have another form")
    files = {}
    for path, row in content.items():
        if not is_safe(path) or path == NAME:
            raise CorruptCheckpointError(f"it lists a file {path[:80]!r}, which no step has")
        if not (
            isinstance(row, list)
            and len(row) == 2
            and type(row[0]) is int
            and 0 <= row[0] < 2**62
            and _is_digest(row[1])
        ):
            raise CorruptCheckpointError(f"size and digest of {path!r} have another form")
        files[path] = FileInfo(num_bytes=row[0], sha256=row[1])
    return files


def _parts(content: Any, leaves: list[Leaf], files: dict[str, FileInfo]) -> tuple[Part, ...]:
    if not isinstance(content, list):
        raise CorruptCheckpointError("its parts have another form")
    parts, placed = [], set()
    for row in content:
        folder = row.get("folder") if isinstance(row, dict) else None
        places = row.get("leaves") if isinstance(row, dict) else None
        if not isinstance(folder, str) or not is_safe(folder) or not isinstance(places, list):
            raise CorruptCheckpointError("a part has another form")
        if not any(path.startswith(f"{folder}/") for path in files):
            raise CorruptCheckpointError(f"part {folder!r} has no files")
        for place in places:
            if not (
                isinstance(place, list) and len(place) == 2 and all(type(n) is int for n in place)
            ):
                raise CorruptCheckpointError("the place of a leaf has another form")
            leaf, offset = place
            if not 0 <= leaf < len(leaves) or leaf in placed or not -1 <= offset < 2**40:
                raise CorruptCheckpointError("the place of a leaf is impossible")
            placed.add(leaf)
        parts.append(Part(folder=folder, leaves=tuple((leaf, at) for leaf, at in places)))
    needed = {i for i, leaf in enumerate(leaves) if not leaf.is_scalar}
    if placed != needed:
        raise CorruptCheckpointError("its parts do not hold its leaves, each once")
    return tuple(parts)
