"""Notebooks run, complain about nothing and show pictures; their rendered copies are up to date."""

from __future__ import annotations

import ast
import base64
import importlib
import re
import struct

import jupytext
import nbformat
import pytest
from render import FOLDER, execute

NOTEBOOKS = sorted(FOLDER.glob("*.py"))
MAX_BYTES = 1_500_000

# What a notebook needs beside this project's own requirements; `make test TORCH=` leaves it out.
NEEDS = {"02_torch_bridge": ("torch", "transformers", "accelerate")}

# What depends on how fast a thread runs.
IS_TIMED = {"03_bus"}

# Lines on stderr that say nothing about the notebook.
HARMLESS = re.compile(
    r"An NVIDIA GPU may be present on this machine"  # JAX's hint where only its CPU build is
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def need(path):
    for name in NEEDS.get(path.stem, ()):
        pytest.importorskip(name)


def rendered(path):
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4)


def outputs(notebook):
    """Yield the number of each code cell with each of its outputs."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield number, output


def pictures(notebook):
    """Yield every picture: bytes of a PNG, or the text of an SVG."""
    for _, output in outputs(notebook):
        data = output.get("data", {})
        if "image/png" in data:
            yield base64.b64decode(data["image/png"])
        elif "image/svg+xml" in data:
            yield data["image/svg+xml"]


def is_bare_figure(output):
    """Tell whether a figure was left as text, as where `%matplotlib inline` is missing."""
    data = output.get("data", {})
    return "<Figure " in data.get("text/plain", "") and not data.keys() - {"text/plain"}


def check_outputs(notebook):
    complaints = [
        f"cell {number}: {line}"
        for number, output in outputs(notebook)
        if output.get("name") == "stderr"
        for line in output["text"].splitlines()
        if line.strip() and not HARMLESS.search(line)
    ]
    assert not complaints, "\n".join(complaints)
    assert list(pictures(notebook)), "no picture among the outputs"
    for picture in pictures(notebook):
        if isinstance(picture, bytes):
            assert picture[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", picture[16:24])
            assert min(width, height) > 100
            assert len(picture) > 2_000, "an empty picture"
        else:
            assert "<path" in picture
    bare = [number for number, output in outputs(notebook) if is_bare_figure(output)]
    assert not bare, f"cells {bare} show the name of a figure instead of the figure"


def texts(notebook):
    """The text of each code cell's outputs, with the last digits of numbers left out."""
    for _, output in outputs(notebook):
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        yield re.sub(r"\d+(\.\d+)?([eE][-+]?\d+)?", "#", text)


def attributes(tree):
    """Yield every chain of attributes of an imported module, such as `ef.lifecycle.settings`."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.partition(".")[0]] = alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module, alias.name
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        names = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if names and isinstance(node, ast.Name) and node.id in modules:
            yield modules[node.id], ".".join(names)


@each_notebook
def test_the_rendered_copy_has_the_same_cells(path):
    source = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    copy = [(cell.cell_type, cell.source) for cell in rendered(path).cells]
    assert source == copy, "run `make notebooks`"


@each_notebook
def test_the_rendered_copy_shows_what_it_ran(path):
    notebook = rendered(path)
    check_outputs(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_rendered_copies_are_small():
    assert NOTEBOOKS
    assert sum(path.with_suffix(".ipynb").stat().st_size for path in NOTEBOOKS) < MAX_BYTES


@each_notebook
def test_names_of_ours_exist(path):
    need(path)
    code = "\n".join(
        re.sub(r"^%.*$", "", cell.source, flags=re.M)
        for cell in jupytext.read(path).cells
        if cell.cell_type == "code"
    )
    chains = {chain for chain in attributes(ast.parse(code)) if chain[0].startswith(OURS)}
    assert len(chains) > 3
    for module, names in chains:
        value = load(module)
        for name in names.split("."):
            value = getattr(value, name)


OURS = ("esper_fn", "torch_bridge")


def load(name):
    """The module or the attribute of a module of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


# Most of the time goes into compiling.
@pytest.mark.slow
@pytest.mark.timeout(900)
@each_notebook
def test_runs_and_shows_pictures(path):
    need(path)
    notebook = execute(path)
    check_outputs(notebook)
    copy = rendered(path)
    kinds = [[sorted(output.get("data", {})) for _, output in outputs(n)] for n in (notebook, copy)]
    assert kinds[0] == kinds[1], "run `make notebooks`"
    if path.stem not in IS_TIMED:
        assert list(texts(notebook)) == list(texts(copy)), "run `make notebooks`"
