"""`esper checkpoint`: what it prints, and its exit status."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esper_fn import checkpoint, cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keep = checkpoint.everything()
    with checkpoint.Writer(tmp_path / "run", keep=keep) as writer:
        for step in range(4):
            writer.save(step, {"x": np.full(3, step)}, metrics={"loss": 4.0 - step})
    return tmp_path / "run"


def test_list_and_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("step 1: 1 leaves, ")
    assert lines[1].endswith("bytes, loss 3")
    assert cli.main(["checkpoint", "verify", str(folder)]) == 0
    assert capsys.readouterr().out == "".join(f"step {step}: sound\n" for step in range(4))


def test_verify_names_the_first_bad_file_and_exits_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = next((folder / "steps" / f"{2:012d}").rglob("_METADATA"))
    bad.write_bytes(b"")
    assert cli.main(["checkpoint", "verify", str(folder)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"step 2: {bad.relative_to(folder)}: 0 bytes instead of ")
    assert said.out == "step 0: sound\nstep 1: sound\nstep 3: sound\n"


def test_prune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["checkpoint", "prune", str(folder), "--every", "2", "--best", "loss"]
    assert cli.main([*options, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "step 0: kept: a multiple of 2",
        "step 1: to be removed: not kept by (every(2) | best(1, 'loss', 'min'))",
    ]
    assert checkpoint.steps(folder) == [0, 1, 2, 3]
    assert cli.main([*options, "--pin", "1"]) == 0
    assert checkpoint.steps(folder) == [0, 1, 2, 3]
    assert cli.main([*options, "--within-bytes", "1"]) == 0
    assert checkpoint.steps(folder) == [3]


def test_wrong_calls(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options in ([], ["--best", "x:loss"], ["--latest", "0"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["checkpoint", "prune", str(folder), *options])
        assert stopped.value.code == 2
    assert cli.main(["checkpoint", "list", str(tmp_path / "nowhere")]) == 1
    assert "it holds no checkpoints" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "nowhere")]) == 1
    assert "name a folder of `esper grow`" in capsys.readouterr().err


def test_a_key_and_a_run_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"0123456789abcdef")
    inner = tmp_path / "job" / "checkpoints" / "seed-0" / "grown"
    checkpoint.save(inner, 1, {"x": np.ones(1)}, key=key.read_bytes())
    run = str(tmp_path / "job")
    assert cli.main(["checkpoint", "verify", run, "--key-file", str(key)]) == 0
    key.write_bytes(b"another key, as long")
    assert cli.main(["checkpoint", "verify", run, "--key-file", str(key)]) == 1
    assert "hmac-sha256 does not match" in capsys.readouterr().err
