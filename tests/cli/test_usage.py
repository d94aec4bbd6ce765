"""Wrong calls: what they say, their exit status, and that they leave nothing behind."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esper_fn import cli
from esper_fn.demo import data, jobs


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ESPER_DATA", raising=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["grow", "--data", "nothing"], ["'nothing'", "digits", "shakespeare"]),
        (["grow", "--policy", "luck"], ["'luck'", "plateau", "random"]),
        (["grow", "--steps", "3"], ["3 is too small; at least 40"]),
        (["grow", "--steps", "many"], ["'many' is not a whole number"]),
        (["grow", "--repeat", "0"], ["0 is too small"]),
        (["grow", "--wrong"], ["--wrong"]),
        ([], ["COMMAND"]),
        (["shrink"], ["shrink"]),
    ],
)
def test_a_wrong_call_exits_with_2(
    arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in said), message
    assert list(tmp_path.iterdir()) == []


def test_help_names_what_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["grow", "--help"])
    text = re.sub(r"-\n +", "-", capsys.readouterr().out)  # names break after a hyphen
    words = set(re.findall(r"[a-z][a-z0-9-]*", text))
    assert {*jobs.POLICIES, *data.names()} <= words


def test_missing_data_exits_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["grow", "--data", "mnist1d"]) == 1
    message = capsys.readouterr().err
    assert "mnist1d.npz" in message
    assert "ESPER_DATA" in message
    assert not (tmp_path / "runs").exists()


def test_corrupt_data_exits_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(b"not what was published")
    status = cli.main(["grow", "--data", "fashion-mnist", "--data-folder", str(tmp_path / "data")])
    assert status == 1
    assert "sha" in capsys.readouterr().err.lower()
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_somebody_else_is_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert cli.main(["grow", "--out", str(mine), "--overwrite"]) == 1
    assert "mine" in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


def test_report_of_nothing_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_help_and_version_load_no_jax() -> None:
    code = (
        "import sys; from esper_fn import cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "esper-fn" in done.stdout


def test_a_folder_that_cannot_be_made_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["grow", "--steps", "40", "--out", "/proc/nowhere"]) == 1
    said = capsys.readouterr().err
    assert "/proc/nowhere" in said
    assert "Traceback" not in said
