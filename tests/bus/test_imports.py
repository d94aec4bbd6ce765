"""Importing the package costs nothing of the bus; the bus costs nothing of JAX."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded(code, *names):
    script = f"{code}\nimport sys\nprint([n for n in {list(names)!r} if n in sys.modules])"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return told.stdout.strip()


@pytest.mark.parametrize(
    "code", ["import esper_fn", "from esper_fn import runtime", "import esper_fn.cli"]
)
def test_the_bus_is_loaded_only_when_it_is_used(code):
    assert loaded(code, "redis", "msgspec", "prometheus_client", "opentelemetry") == "[]"


def test_the_bus_and_the_monitoring_load_no_jax():
    assert loaded("import esper_fn.bus, esper_fn.monitoring", "jax", "flax", "rich") == "[]"
