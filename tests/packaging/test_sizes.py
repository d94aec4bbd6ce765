"""Files have at most 400 lines and functions at most 60, docstrings included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["kernels/esper_kernels", "torch_bridge/_convert"]
MOST_LINES, MOST_LINES_OF_FUNCTION = 400, 60
EXEMPT = {
    "backward_kernel": "compilers want its 44 parameters flat, which stand one a line",
}


def functions(path):
    """Names and sizes of all functions of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_functions_are_short(package):
    long = []
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.read_text().count("\n") > MOST_LINES:
            long.append(str(path))
        long += [
            f"{path}: {name} has {size} lines"
            for name, size in functions(path)
            if size > MOST_LINES_OF_FUNCTION and name not in EXEMPT
        ]
    assert not long


def test_exempt_functions_exist():
    sizes = dict(
        pair
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for pair in functions(path)
    )
    assert all(sizes.get(name, 0) > MOST_LINES_OF_FUNCTION for name in EXEMPT)
