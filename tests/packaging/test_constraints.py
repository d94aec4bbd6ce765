"""`constraints.txt` pins every direct dependency, once a Python, inside the range users get."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    requirement
    for line in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    if (requirement := Requirement(line)).name != PROJECT["name"]
]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def pinned(name: str, python: str) -> list[SpecifierSet]:
    """Return what `constraints.txt` says about a distribution under one version of Python."""
    return [
        pin.specifier
        for pin in PINS
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate({"python_version": python}))
    ]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_pinned_exactly_once_within_range(requirement, python):
    (specifiers,) = pinned(requirement.name, python)
    (specifier,) = specifiers
    assert specifier.operator == "=="
    assert requirement.specifier.contains(specifier.version)


def test_nothing_else_is_pinned():
    direct = {canonicalize_name(requirement.name) for requirement in DIRECT}
    assert {canonicalize_name(pin.name) for pin in PINS} == direct | {"jaxlib"}


def test_python_311_gets_the_last_jax_that_supports_it():
    assert pinned("jax", "3.11") == pinned("jaxlib", "3.11") == [SpecifierSet("==0.10.2")]
