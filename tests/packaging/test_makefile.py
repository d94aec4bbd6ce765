"""The commands in the documents exist, and the Makefile installs when it must and only then."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, flags=re.MULTILINE))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

# Stands in for Python: it "creates" an environment that holds itself, and writes down each pip run.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
  "-m pip") echo "$@" >> pip.log; exit ${PIP_STATUS:-0} ;;
  "-c "*) exit ${CHECK_STATUS:-0} ;;
  *) echo "Python 3.11.0" ;;
esac
"""


def named_targets(markdown: str) -> set[str]:
    """Return the words after each `make` that begins a command in code, inline or fenced."""
    fences = re.compile(r"^ *```.*\n([\s\S]*?)^ *```", flags=re.MULTILINE)
    lines = [line for block in fences.findall(markdown) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", fences.sub("", markdown))
    unquoted = [re.sub(r"#.*|\"[^\"]*\"|'[^']*'", "", line) for line in lines]
    commands = [part.split() for line in unquoted for part in re.split(r"&&|;|\|", line)]
    return {
        word
        for words in commands
        if "make" in words[:2] and words[0] in {"make", "$"}
        for word in words[words.index("make") + 1 :]
        if re.fullmatch(r"[a-z][a-z-]*", word)
    }


def test_named_targets_reads_code_only():
    prose = "we make demo sense with `make one`, `$ make two JOBS=4` and `remake six`\n"
    block = "```sh\nmake three ARGS='-k seven'  # make four\ncd x && make five\n```\n"
    assert named_targets(prose + block + prose) == {"one", "two", "three", "five"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_existing_targets(path):
    assert named_targets(path.read_text()) <= TARGETS


def test_contributing_names_the_commands_of_every_day():
    named = named_targets((ROOT / "CONTRIBUTING.md").read_text())
    assert {"demo", "test", "test-all", "format"} <= named


def test_targets_are_phony():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert TARGETS | {"FORCE"} == set(phony.split())


def test_ci_runs_the_test_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1].split()[:2] == ["make", "test"]
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestInstall:
    """Runs make in a folder of its own, with a stand-in for Python."""

    @pytest.fixture
    def folder(self, tmp_path):
        for name in ["Makefile", "pyproject.toml", "constraints.txt"]:
            shutil.copy(ROOT / name, tmp_path)
        python = tmp_path / "fake-python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
        return tmp_path

    def make(self, folder, *arguments, **environment):
        """Run make as from a fresh shell, and return the process and pip's commands so far."""
        outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TORCH", "TORCH_INDEX", "VENV", "PYTHON"}
        process = subprocess.run(
            ["make", "PYTHON=./fake-python", *arguments],
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k not in outer} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        log = folder / "pip.log"
        return process, log.read_text().splitlines() if log.exists() else []

    def touch_later(self, path):
        """Give a file a modification time after every stamp's."""
        later = path.stat().st_mtime + 60
        os.utime(path, (later, later))

    def test_second_run_installs_nothing(self, folder):
        for _ in range(2):
            process, pip = self.make(folder, "install")
            assert process.returncode == 0, process.stderr
        (command,) = pip
        assert "-c constraints.txt -e .[cli]" in command

    @pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
    @pytest.mark.parametrize("target", ["install", "install-dev"])
    def test_changed_requirements_install_again(self, folder, target, name):
        _, before = self.make(folder, target)
        self.touch_later(folder / name)
        process, after = self.make(folder, target)
        assert "==> creating" not in process.stdout
        assert after[len(before) :] == before[-1:]

    def test_torch_goes_in_first(self, folder):
        _, pip = self.make(folder, "install-dev")
        torch, dev = pip
        assert torch.endswith(" torch==2.13.0")
        assert dev.endswith(" -e .[dev,integrations]")

    def test_torch_may_come_from_its_own_index(self, folder):
        _, pip = self.make(folder, "install-dev", TORCH_INDEX="file:///wheels")
        assert "--index-url file:///wheels torch==2.13.0" in pip[0]

    def test_torch_may_be_left_out_and_added_later(self, folder):
        _, pip = self.make(folder, "install-dev", "TORCH=")
        assert len(pip) == 1
        _, pip = self.make(folder, "install-dev")
        assert pip[1].endswith(" torch==2.13.0")

    def test_development_environment_serves_the_demo(self, folder):
        _, before = self.make(folder, "install-dev")
        _, after = self.make(folder, "install")
        assert after == before

    def test_failed_installation_is_explained_and_tried_again(self, folder):
        process, pip = self.make(folder, "install", PIP_STATUS="1")
        assert process.returncode != 0
        assert "no package index answered" in process.stderr
        assert len(pip) == 1
        process, pip = self.make(folder, "install")
        assert process.returncode == 0
        assert len(pip) == 2

    def test_old_python_is_refused(self, folder):
        process, pip = self.make(folder, "demo", CHECK_STATUS="1")
        assert process.returncode != 0
        assert "older than Python 3.11" in process.stderr
        assert "make demo PYTHON=python3.12" in process.stderr
        assert not pip
        assert not (folder / ".venv").exists()

    def test_clean_removes_an_environment_and_nothing_else(self, folder):
        self.make(folder, "install")
        self.make(folder, "clean")
        assert not (folder / ".venv").exists()
        (folder / "mine").mkdir()
        process, _ = self.make(folder, "clean", "VENV=mine")
        assert process.returncode == 0
        assert (folder / "mine").is_dir()
