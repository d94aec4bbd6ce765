"""Every notebook runs from top to bottom, complains about nothing, and shows pictures."""

from __future__ import annotations

import base64
import json
import re
import struct
import sys
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))

# What a notebook needs beside this project's own requirements; `make test TORCH=` leaves it out.
NEEDS = {"02_torch_bridge": ("torch", "transformers", "accelerate")}

# Lines on stderr that say nothing about the notebook.
HARMLESS = re.compile(
    r"An NVIDIA GPU may be present on this machine"  # JAX's hint where only its CPU build is
)

# Most of the time goes into compiling.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Name a kernel that is this very interpreter, whatever kernels the machine has installed."""
    folder = tmp_path / "jupyter" / "kernels" / "esper-test"
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "the interpreter under test",
        "language": "python",
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return folder.name


def outputs(notebook):
    """Yield the number of each code cell with each of its outputs."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield number, output


def pictures(notebook):
    """Yield every picture: bytes of a PNG, or the text of an SVG."""
    for _, output in outputs(notebook):
        found = output.get("data", {})
        if "image/png" in found:
            yield base64.b64decode(found["image/png"])
        elif "image/svg+xml" in found:
            yield found["image/svg+xml"]


def is_bare_figure(output):
    """Tell whether a figure was left as text, as where `%matplotlib inline` is missing."""
    found = output.get("data", {})
    return "<Figure " in found.get("text/plain", "") and not found.keys() - {"text/plain"}


@pytest.mark.parametrize(
    "path",
    [
        # The first one trains whole arms, for minutes.
        pytest.param(path, marks=[pytest.mark.slow] if path.stem == "01_quickstart" else [])
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_runs_and_shows_pictures(path, kernel, tmp_path):
    for name in NEEDS.get(path.stem, ()):
        pytest.importorskip(name)
    notebook = jupytext.read(path)
    workplace = tmp_path / "work"
    workplace.mkdir()
    client = NotebookClient(
        notebook,
        kernel_name=kernel,
        timeout=600,
        resources={"metadata": {"path": str(workplace)}},
    )
    client.execute()

    complaints = [
        f"cell {number}: {line}"
        for number, output in outputs(notebook)
        if output.get("name") == "stderr"
        for line in output["text"].splitlines()
        if line.strip() and not HARMLESS.search(line)
    ]
    assert not complaints, "\n".join(complaints)

    shown = list(pictures(notebook))
    assert shown, "no picture among the outputs"
    for picture in shown:
        if isinstance(picture, bytes):
            assert picture[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", picture[16:24])
            assert min(width, height) > 100
            assert len(picture) > 2_000, "an empty picture"
        else:
            assert "<path" in picture
    bare = [number for number, output in outputs(notebook) if is_bare_figure(output)]
    assert not bare, f"cells {bare} show the name of a figure instead of the figure"


def test_there_is_a_notebook():
    assert NOTEBOOKS
