"""Damage of every kind is found before anything is read, and an older step takes over."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_support import Pair, assert_same, fail, files_of, flip, step_folder, value
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_fn import checkpoint
from esper_fn.checkpoint import _files, _manifest, _orbax, _verify
from esper_fn.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError

KEY = b"0123456789abcdef"
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "run"
    keep = checkpoint.everything()
    with checkpoint.Writer(folder, keep=keep, share_unchanged=False, on_failure=fail) as writer:
        for step in (1, 2):
            writer.save(step, value(step, big=300_000), record={"step": step}, parts=("big",))
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def data_file(run: Path, step: int) -> Path:
    """The largest file: array data."""
    return max(files_of(step_folder(run, step) / "data"), key=lambda file: file.stat().st_size)


def assert_noticed(run: Path, step: int = 2) -> checkpoint.Damage:
    """The step is bad, says which file, is not restored, and the older one takes over."""
    damage = checkpoint.verify(run)[step]
    assert damage is not None
    with pytest.raises((CorruptCheckpointError, NoCheckpointError)):
        checkpoint.restore(run, step)
    restored = checkpoint.restore(run)
    assert restored.step == 1
    assert [bad.step for bad in restored.passed_over] == [2]
    assert_same(value(1, big=300_000), restored.value)
    return damage


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flip in the data": lambda run: flip(data_file(run, 2), 12_345),
    "truncated": lambda run: os.truncate(data_file(run, 2), 1000),
    "emptied": lambda run: os.truncate(data_file(run, 2), 0),
    "longer": lambda run: os.truncate(data_file(run, 2), data_file(run, 2).stat().st_size + 1),
    "deleted": lambda run: data_file(run, 2).unlink(),
    "orbax's metadata deleted": lambda run: next(step_folder(run, 2).rglob("_METADATA")).unlink(),
    "record deleted": lambda run: (step_folder(run, 2) / "record.json").unlink(),
    "manifest deleted": lambda run: (step_folder(run, 2) / "manifest.jsonl").unlink(),
    "manifest emptied": lambda run: os.truncate(step_folder(run, 2) / "manifest.jsonl", 0),
    "a file more": lambda run: (step_folder(run, 2) / "data" / "more").write_bytes(b""),
    "manifest of the step before": lambda run: shutil.copy(
        step_folder(run, 1) / "manifest.jsonl", step_folder(run, 2) / "manifest.jsonl"
    ),
    "data of the step before": lambda run: shutil.copy(data_file(run, 1), data_file(run, 2)),
    "the step before under this name": lambda run: (
        shutil.rmtree(step_folder(run, 2)),
        shutil.copytree(step_folder(run, 1), step_folder(run, 2)),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed(run: Path, name: str) -> None:
    DAMAGES[name](run)
    assert_noticed(run)


def test_verify_names_the_first_bad_file(run: Path) -> None:
    flip(data_file(run, 2), 12_345)
    damage = assert_noticed(run)
    assert damage.file == data_file(run, 2).relative_to(run).as_posix()
    assert damage.problem == "its SHA-256 does not match"
    data_file(run, 2).unlink()
    assert checkpoint.verify(run)[2] == damage._replace(problem="missing")


def test_every_bad_file_is_named(run: Path) -> None:
    for file in files_of(step_folder(run, 2) / "data"):
        flip(file, 0) if file.stat().st_size else file.write_bytes(b"x")
    bad = {damage.file for damage in _verify.damages(run, 2)}
    assert bad == {f.relative_to(run).as_posix() for f in files_of(step_folder(run, 2) / "data")}


def flips(run: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Random bytes of random files: every other time uniform over bytes, else over files."""
    source = np.random.default_rng(seed)
    files = [file for file in files_of(step_folder(run, 2)) if file.stat().st_size]
    sizes = np.asarray([file.stat().st_size for file in files])
    for index in range(count):
        odds = sizes / sizes.sum() if index % 2 else None
        file = files[source.choice(len(files), p=odds)]
        position = int(source.integers(file.stat().st_size))
        yield file, position, 1 << int(source.integers(8))


def check_flips(run: Path, count: int) -> None:
    for file, position, mask in flips(run, count, seed=0):
        flip(file, position, mask)
        damage = checkpoint.verify(run)[2]
        assert damage is not None, (file, position, mask)
        assert damage.file == file.relative_to(run).as_posix()
        with pytest.raises(CorruptCheckpointError):
            checkpoint.restore(run, 2)
        flip(file, position, mask)
    assert checkpoint.verify(run) == {1: None, 2: None}


def test_one_flipped_bit_anywhere_is_noticed(run: Path) -> None:
    check_flips(run, 30)


@pytest.mark.slow
def test_one_flipped_bit_at_200_places_is_noticed(run: Path) -> None:
    check_flips(run, 200)


def test_every_byte_of_a_manifest_counts(run: Path) -> None:
    data = (step_folder(run, 2) / "manifest.jsonl").read_bytes()
    places = np.random.default_rng(0).integers(len(data), size=300)
    for position in {*places.tolist(), 0, len(data) - 1, *range(len(data) - 90, len(data))}:
        for mask in (0x01, 0x20, 0x80):
            flipped = bytearray(data)
            flipped[position] ^= mask
            with pytest.raises(CheckpointError):
                _manifest.decode(bytes(flipped), None)


def test_orbax_alone_would_have_read_the_flipped_bit(run: Path) -> None:
    """Why there are digests at all; when this fails, Orbax has learned to check."""
    file = data_file(run, 2)
    flip(file, file.stat().st_size // 2)
    part = next(
        folder for folder in (step_folder(run, 2) / "data").iterdir() if folder in file.parents
    )
    arrays = _orbax.read(part, {"leaf0": ((300_000,), np.dtype(np.float32))})["leaf0"]
    assert (arrays != value(2, big=300_000)["big"]).sum() == 1


def test_what_was_read_is_compared_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes between its verification and its reading."""
    read = _orbax.read

    def late(folder: Path, expected: Any) -> Any:
        arrays = {name: array.copy() for name, array in read(folder, expected).items()}
        next(iter(arrays.values())).reshape(-1).view(np.uint8)[3] ^= 1
        return arrays

    monkeypatch.setattr(_orbax, "read", late)
    with pytest.raises(CorruptCheckpointError, match="is not the one that was saved"):
        checkpoint.restore(run, 2)


# --- forgery -----------------------------------------------------------------------------------


def forge(run: Path, change: Callable[[dict[str, Any]], Any], key: bytes | None = None) -> None:
    """Changes a manifest and seals it again, as an attacker without (or with) the key would."""
    file = step_folder(run, 2) / "manifest.jsonl"
    content = json.loads(file.read_bytes().split(b"\n")[0])
    change(content)
    payload = json.dumps(content, separators=(",", ":")).encode()
    seal = {"sha256": hashlib.sha256(payload).hexdigest()}
    if key is not None:
        said = hmac.new(key, b"esper-fn checkpoint manifest\n" + payload, "sha256")
        seal["hmac_sha256"] = said.hexdigest()
    file.write_bytes(payload + b"\n" + json.dumps(seal, separators=(",", ":")).encode() + b"\n")


def test_a_manifest_of_another_run_is_noticed(run: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "other", 2, value(2))
    shutil.rmtree(step_folder(run, 2))
    shutil.copytree(step_folder(tmp_path / "other", 2), step_folder(run, 2))
    assert "manifest of another run" in assert_noticed(run).problem


def test_a_newer_format_is_refused_and_not_taken_for_damage(run: Path) -> None:
    forge(run, lambda content: content.update(version=_manifest.VERSION + 1))
    for call in (lambda: checkpoint.restore(run, 2), lambda: checkpoint.verify(run)):
        with pytest.raises(CheckpointError, match="install the one that wrote it") as error:
            call()
        assert not isinstance(error.value, CorruptCheckpointError)
    with pytest.raises(CheckpointError, match="install the one that wrote it"):
        checkpoint.restore(run)  # an older step must not take over silently


def test_a_key_tells_forgery_from_truth(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, value(step, big=300_000), key=KEY)
    forge(tmp_path, lambda content: content["metrics"].update(loss=0.0))
    for key, said in ((KEY, "no HMAC"), (None, None)):
        damage = checkpoint.verify(tmp_path, key=key)[2]
        assert (damage is None) if said is None else said in damage.problem
    forge(tmp_path, lambda content: None, key=b"a key of another")
    assert "hmac-sha256 does not match" in checkpoint.verify(tmp_path, key=KEY)[2].problem
    assert checkpoint.restore(tmp_path, key=KEY).step == 1


HOSTILE = {
    "a path outside": lambda c: c["files"].update({"../../run.json": [1, "0" * 64]}),
    "an absolute path": lambda c: c["files"].update({"/etc/passwd": [1, "0" * 64]}),
    "a part outside": lambda c: c["parts"][0].update(folder="../../../etc"),
    "a huge array": lambda c: next(leaf for leaf in c["leaves"] if leaf["path"] == "big").update(
        shape=[2**40]
    ),
    "a huge rank": lambda c: c["leaves"][0].update(shape=[1] * 100),
    "a negative shape": lambda c: c["leaves"][0].update(shape=[-1]),
    "another dtype": lambda c: next(leaf for leaf in c["leaves"] if leaf["path"] == "big").update(
        dtype="int32"
    ),
    "objects": lambda c: c["leaves"][0].update(dtype="object"),
    "leaves left out": lambda c: c["leaves"].pop(),
    "a leaf twice": lambda c: c["parts"][0]["leaves"].append(c["parts"][0]["leaves"][0]),
    "an offset outside": lambda c: c["parts"][-1]["leaves"][0].__setitem__(1, 2**39),
    "no structure": lambda c: c.update(structure=None),
    "a structure that calls": lambda c: c.update(
        structure={"kind": "named", "name": "os.system", "keys": ["command"], "children": [0]}
    ),
    "files listed away": lambda c: c.update(files={}),
    "metrics of words": lambda c: c["metrics"].update(loss="low"),
    "another format": lambda c: c.update(format="pickle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_fails_before_it_costs_or_does_anything(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key anybody can seal; so nothing in a manifest may be trusted to be harmless."""
    forge(run, HOSTILE[name])
    restore = _orbax.ocp.Checkpointer.restore

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        assert name in ("no structure", "a structure that calls"), "arrays were read"
        return restore(self, *arguments, **options)

    monkeypatch.setattr(_orbax.ocp.Checkpointer, "restore", counted)
    with pytest.raises(CheckpointError):
        checkpoint.restore(run, 2)


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    file = data_file(run, 2)
    shutil.move(file, secret)
    file.symlink_to(secret)
    assert "neither a plain file nor a folder" in assert_noticed(run).problem
    shutil.move(step_folder(run, 2), tmp_path / "elsewhere")
    step_folder(run, 2).symlink_to(tmp_path / "elsewhere")
    assert checkpoint.steps(run) == [1]


def test_a_pipe_in_place_of_a_file_blocks_nobody(run: Path) -> None:
    manifest = step_folder(run, 2) / "manifest.jsonl"
    manifest.unlink()
    os.mkfifo(manifest)
    assert "not a plain file" in assert_noticed(run).problem


@given(st.text(max_size=20) | st.sampled_from(["a/../b", "a//b", "./a", "a/", "C:\\x", "a\0b"]))
@settings(max_examples=300, deadline=None)
def test_safe_paths_stay_inside(path: str) -> None:
    if _files.is_safe(path):
        assert Path("/root", path).resolve().is_relative_to("/root")
        assert os.path.normpath(path) == path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_fuzzed_manifest_does_no_more_than_fail(pristine: Path, data: st.DataObject) -> None:
    lines = (step_folder(pristine, 2) / "manifest.jsonl").read_bytes().split(b"\n")
    content = json.loads(lines[0])
    node, keys = content, []
    while isinstance(node, dict | list) and node and data.draw(st.booleans()):
        keys.append(
            data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        )
        node = node[keys[-1]]
    holder = content
    for key in keys[:-1]:
        holder = holder[key]
    if keys:
        holder[keys[-1]] = data.draw(JSON)
    payload = json.dumps(content).encode()
    seal = json.dumps({"sha256": hashlib.sha256(payload).hexdigest()}, separators=(",", ":"))
    try:
        manifest = _manifest.decode(payload + b"\n" + seal.encode() + b"\n", None)
    except CheckpointError:
        return
    assert all(_files.is_safe(name) for name in manifest.files)
    assert all(_files.is_safe(part.folder) for part in manifest.parts)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        _manifest.decode(data, None)


# --- formats -----------------------------------------------------------------------------------


FORMAT_1 = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "count": 3,
    "pair": (np.asarray([1, -2], np.int8), None),
    "more": [{5: Pair(left=np.asarray([True]), right=0.1)}],
}


def test_the_format_of_files_is_still_that_of_the_fixture(tmp_path: Path) -> None:
    """`fixtures/README.md` says what to do where a change of the format is meant."""
    restored = checkpoint.restore(FIXTURES / "format1")
    assert restored.step == 40
    assert restored.record == {"note": "kept since version 1"}
    assert_same(FORMAT_1, restored.value)
    assert checkpoint.verify(FIXTURES / "format1") == {40: None}
    checkpoint.save(tmp_path, 40, FORMAT_1, record=restored.record)
    for name in ("structure", "leaves", "parts", "metrics", "format", "version"):
        before, now = (
            json.loads((step_folder(root, 40) / "manifest.jsonl").read_bytes().split(b"\n")[0])
            for root in (FIXTURES / "format1", tmp_path)
        )
        assert before[name] == now[name], name
