"""The wheel holds three whole packages and nothing else; the version stands in one file."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "esper_fn": ROOT / "esper_fn",
    "torch_bridge": ROOT / "torch_bridge",
    "esper_kernels": ROOT / "kernels" / "esper_kernels",
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION_FILE = PYPROJECT["tool"]["hatch"]["version"]["path"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel as an installer would, with the hatchling at hand, and open it."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def dist_info(wheel):
    (name,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    return name


@pytest.fixture(scope="module")
def metadata(wheel, dist_info):
    return Parser().parsestr(wheel.read(f"{dist_info}/METADATA").decode())


def test_top_level_names(wheel, dist_info):
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert top_level == {*PACKAGES, dist_info}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_whole(wheel, package):
    # hatchling skips what .gitignore names, at any depth: a subpackage `build` would vanish.
    folder = PACKAGES[package]
    on_disk = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert packed == on_disk


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(wheel, package):
    assert f"{package}/py.typed" in wheel.namelist()


def test_licence_is_packed(wheel, dist_info):
    text = wheel.read(f"{dist_info}/licenses/LICENSE").decode()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_torch_is_optional(metadata):
    required = {
        requirement.name
        for requirement in map(Requirement, metadata.get_all("Requires-Dist"))
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    assert "jax" in required
    assert "torch" not in required


def test_version_of_the_wheel_is_the_version_of_the_package(metadata):
    code = "import esper_fn._version as v; print(v.__version__)"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert metadata["Version"] == imported.stdout.strip()


def test_version_is_written_once():
    assert "version" in PYPROJECT["project"]["dynamic"]
    assigning = [
        path.relative_to(ROOT).as_posix()
        for folder in PACKAGES.values()
        for path in sorted(folder.rglob("*.py"))
        if _assigns_version(path)
    ]
    assert assigning == [VERSION_FILE]


def _assigns_version(path: Path) -> bool:
    """Return whether a module sets `__version__` to a literal; importing the name does not."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(t, ast.Name) and t.id == "__version__" for t in targets):
            return isinstance(node.value, ast.Constant)
    return False
