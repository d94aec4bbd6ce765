"""Rules of the house that a tool can check: sizes, names, and who imports what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "esper_fn": ROOT / "esper_fn",
    "torch_bridge": ROOT / "torch_bridge",
    "esper_kernels": ROOT / "kernels" / "esper_kernels",
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
EXEMPT = {"backward_kernel"}
"""Its 44 parameters stand one a line, as compilers want them flat."""

BANNED = frozenset(
    [
        "of",
        "told",
        "asked",
        "held",
        "kept",
        "found",
        "given",
        "place",
        "here",
        "there",
        "way",
        "hear",
        "bear",
        "tell",
        "wanted",
        "at",
        "one",
    ]
)
"""Identifiers that say nothing about what they name."""

FILES = [file for folder in PACKAGES.values() for file in sorted(folder.rglob("*.py"))]


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _module(file: Path) -> str:
    base = ROOT / "kernels" if "kernels" in file.parts else ROOT
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that a module binds: variables, parameters, attributes, functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module, or name in a module, that a file imports."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {_name(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = {}
    for file in FILES:
        for function in _functions(_tree(file)):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MAX_FUNCTION_LINES and function.name not in EXEMPT:
                long[f"{_name(file)}:{function.lineno} {function.name}"] = lines
    assert long == {}


def test_identifiers_are_nouns_and_verbs() -> None:
    bad = [
        f"{_name(file)}:{line} {name}"
        for file in FILES
        for line, name in _bound_names(_tree(file))
        if name.strip("_") in BANNED
    ]
    assert bad == []


def test_no_package_imports_private_names_of_another() -> None:
    bad = []
    for file in FILES:
        own = _module(file).split(".")[0]
        for line, target in _imports(file):
            package, *rest = target.split(".")
            is_private = any(part.startswith("_") and part != "__version__" for part in rest)
            if package in PACKAGES and package != own and is_private:
                bad.append(f"{_name(file)}:{line} {target}")
    assert bad == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circles(package: str) -> None:
    """Imports under `TYPE_CHECKING` and inside functions count too."""
    modules = {_module(file): file for file in PACKAGES[package].rglob("*.py")}
    arrows: dict[str, set[str]] = {}
    for module, file in modules.items():
        targets = {
            name for _, target in _imports(file) for name in (target, target.rpartition(".")[0])
        }
        direct = {name for name in targets if name in modules and name != module}
        # A package's `__init__` only re-exports, so it is no stop on a circle.
        arrows[module] = {name for name in direct if modules[name].name != "__init__.py"}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for target in sorted(arrows[module]):
            circle = visit(target, [*trail, module])
            if circle:
                return circle
        done.add(module)
        return []

    for module in sorted(modules):
        assert visit(module, []) == []
