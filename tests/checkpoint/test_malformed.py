"""A newest step of any malformed kind: an older one takes over, is said, and saves go on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoint_support import fail, step_folder

from esper_fn import checkpoint
from esper_fn.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::esper_fn.checkpoint.CheckpointWarning")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed") / "run"
    for step in (1, 2):
        tree = {"x": np.full(3, step), "key": jax.random.key(step), "n": 1.5, "i": 3, "t": (1, {})}
        checkpoint.save(folder, step, tree, record={"a": [1]})
    return folder


def manifest(run: Path) -> Path:
    return step_folder(run, 2) / "manifest.jsonl"


def sealed(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """A manifest changed in place, or replaced by bytes, with a seal that fits."""

    def forge(run: Path) -> None:
        content = json.loads(manifest(run).read_bytes().split(b"\n")[0])
        payload = change(content)
        if not isinstance(payload, bytes):
            payload = json.dumps(content, separators=(",", ":")).encode()
        seal = b'{"sha256":"' + hashlib.sha256(payload).hexdigest().encode() + b'"}'
        manifest(run).write_bytes(payload + b"\n" + seal + b"\n")

    return forge


def leaf(path: str, **fields: Any) -> Callable[[Path], Any]:
    return sealed(lambda c: next(x for x in c["leaves"] if x["path"] == path).update(fields))


def structure(node: Any) -> Callable[[Path], Any]:
    return sealed(lambda content: content.update(structure=node))


def deep(content: Any) -> None:
    for _ in range(110):
        content["structure"] = {"kind": "list", "children": [content["structure"]]}


def instead(file: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Another thing in place of a file or folder of the step."""

    def replace(run: Path) -> None:
        target = step_folder(run, 2) / file if file else step_folder(run, 2)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        make(target)

    return replace


MALFORMED: dict[str, Callable[[Path], Any]] = {
    "manifest is a folder": instead("manifest.jsonl", Path.mkdir),
    "manifest is a dangling link": instead("manifest.jsonl", lambda f: f.symlink_to("nowhere")),
    "manifest is a link in a circle": instead("manifest.jsonl", lambda f: f.symlink_to(f)),
    "manifest is a pipe": instead("manifest.jsonl", os.mkfifo),
    "manifest is missing": lambda run: manifest(run).unlink(),
    "manifest is empty": lambda run: manifest(run).write_bytes(b""),
    "manifest is cut": lambda run: os.truncate(manifest(run), 100),
    "manifest is no UTF-8": sealed(lambda _: b"\xff\xfe{}"),
    "manifest is deep": sealed(lambda _: b"[" * 50_000 + b"]" * 50_000),
    "manifest is a list": sealed(lambda _: b"[]"),
    "seal with half a character": lambda run: manifest(run).write_bytes(
        b'{}\n{"sha256":"\\ud800"}\n'
    ),
    "metric too large for a float": sealed(lambda c: c.update(metrics={"loss": 10**400})),
    "number of 5000 digits": sealed(lambda _: b'{"a":' + b"9" * 5000 + b"}"),
    "scalar too large for a float": leaf("n", scalar="0x1p99999"),
    "scalar that is no int": leaf("i", scalar="three"),
    "key of another dtype": leaf("x", key="threefry2x32"),
    "key of another kind": leaf("key", key="rbg"),
    "shape beyond any memory": leaf("x", shape=[2**61, 2**61]),
    "shape of words": leaf("x", shape=["3"]),
    "dtype of a list": leaf("x", dtype=["int64"]),
    "structure too deep": sealed(deep),
    "structure with a leaf twice": structure({"kind": "list", "children": [0, 0]}),
    "structure without children": structure({"kind": "list", "children": None}),
    "structure with strange keys": structure(
        {"kind": "dict", "keys": [{}, []], "children": [0, 1]}
    ),
    "structure of no kind": structure({"kind": ["dict"], "children": [0]}),
    "files with half a character": sealed(lambda c: c["files"].update({"\ud800": [1, "0" * 64]})),
    "files with a zero byte": sealed(lambda c: c["files"].update({"a\0": [1, "0" * 64]})),
    "file that is a folder": sealed(lambda c: c["files"].update({"data": [1, "0" * 64]})),
    "part at an offset outside": sealed(
        lambda c: c["parts"][-1]["leaves"][0].__setitem__(1, 2**39)
    ),
    "step of a word": sealed(lambda c: c.update(step="2")),
    "no leaves": sealed(lambda c: c.pop("leaves")),
    "record is a folder": instead("record.json", Path.mkdir),
    "record is deep": lambda run: (step_folder(run, 2) / "record.json").write_bytes(b"[" * 9999),
    "data is a file": instead("data", lambda file: file.write_bytes(b"x")),
    "step is a file": instead("", lambda file: file.write_bytes(b"x")),
    "step is a link": instead("", lambda file: file.symlink_to(step_folder(file.parents[1], 1))),
    "step is a dangling link": instead("", lambda file: file.symlink_to("nowhere")),
    "step is empty": instead("", Path.mkdir),
    "a pipe more": lambda run: os.mkfifo(step_folder(run, 2) / "pipe"),
    "a name that is no UTF-8": lambda run: os.mkdir(os.fsencode(step_folder(run, 2)) + b"/\xff"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_an_older_step_takes_over_and_saves_go_on(
    pristine: Path, tmp_path: Path, name: str
) -> None:
    run = Path(shutil.copytree(pristine, tmp_path / "run"))
    MALFORMED[name](run)
    if name == "a name that is no UTF-8":  # an empty folder more is no harm
        assert checkpoint.restore(run).step == 2
        return
    is_listed = 2 in checkpoint.steps(run)
    with checkpoint.Writer(run, on_failure=fail) as writer:
        restored = writer.restore()
        assert restored.step == 1
        assert [damage.step for damage in restored.passed_over] == [2] * is_listed
        assert (checkpoint.verify(run).get(2) is not None) == (
            is_listed and name != "part at an offset outside"
        )
        for step in (3, 2, 4):
            writer.save(step, {"x": np.full(3, step)})
            assert writer.wait()
    assert checkpoint.restore(run).step == 4
    assert checkpoint.restore(run, 2).value["x"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("step", [True, False, np.True_, 1.0, "1", None, -1, 10**12, np.ones(2)])
def test_a_wrong_step_is_refused_with_what_is_allowed(tmp_path: Path, step: Any) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        with pytest.raises(CheckpointError, match="step must be an int from 0 to 999999999999"):
            writer.save(step, {})
        if step is not None:
            with pytest.raises(CheckpointError, match="step must be an int from 0 to"):
                writer.restore(step)
    assert checkpoint.steps(tmp_path) == []


def test_integers_of_numpy_and_jax_are_steps(tmp_path: Path) -> None:
    for step in (np.int64(1), np.uint8(2), jax.numpy.int32(3), np.asarray(4)):
        checkpoint.save(tmp_path, step, {"x": np.ones(1)})  # type: ignore[arg-type]
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]
    assert checkpoint.verify(tmp_path) == dict.fromkeys((1, 2, 3, 4))
    assert checkpoint.restore(tmp_path, np.int64(3)).step == 3  # type: ignore[arg-type]
    assert type(checkpoint.restore(tmp_path).step) is int
