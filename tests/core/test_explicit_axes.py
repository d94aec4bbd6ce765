"""Mesh axes of type Explicit, which `jax.make_mesh` makes: in a process with two devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import esper_fn as ef

TWO_DEVICES = "--xla_force_host_platform_device_count=2"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["data", "features"])
def test_divided_arrays_measure_and_decide_as_whole_ones(way: str) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(Path(ef.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(here / "explicit_axes.py"), way],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {TWO_DEVICES}",
            "PYTHONPATH": path,
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
