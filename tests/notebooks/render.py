"""Runs notebooks: `python tests/notebooks/render.py` writes each `.py` again as an `.ipynb`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jupytext
import matplotlib as mpl
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
KERNEL = "esper-test"


@contextmanager
def environment() -> Iterator[None]:
    """Gives kernels this very interpreter, a CPU, XLA as for users, and no data but our own."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "jupyter" / "kernels" / KERNEL
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = {"argv": command, "display_name": "this interpreter", "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))
        for variable in ("XLA_FLAGS", "ESPER_DATA"):
            os.environ.pop(variable, None)
        os.environ |= {
            "JUPYTER_PATH": str(Path(name) / "jupyter"),
            "JUPYTER_RUNTIME_DIR": str(Path(name) / "runtime"),
            "IPYTHONDIR": str(Path(name) / "ipython"),
            "XDG_CACHE_HOME": str(Path(name) / "cache"),
            "MPLCONFIGDIR": mpl.get_cachedir(),
            "JAX_PLATFORMS": "cpu",
        }
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def execute(path: Path) -> Any:
    """Runs a notebook of percent cells from top to bottom and returns it with its outputs."""
    notebook = jupytext.read(path)
    with environment(), tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook,
            kernel_name=KERNEL,
            timeout=600,
            record_timing=False,
            coalesce_streams=True,
            resources=resources,
        )
        client.execute()
    return notebook


def write(path: Path) -> Path:
    """Runs a notebook and writes it beside its source; what changes by chance is left out."""
    notebook = execute(path)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.clear()
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    target = path.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


if __name__ == "__main__":
    for source in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.py"))):
        rendered = write(source)
        print(f"{rendered.name}: {rendered.stat().st_size:,} bytes")
