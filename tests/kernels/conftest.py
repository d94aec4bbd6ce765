"""The kernels run on a GPU where there is one, else in their interpreters."""

import sys

import pytest

_parts = sys.modules.get("esper_kernels.graft._triton_parts")  # as `tests/conftest.py` loaded it
IS_INTERPRETED = _parts is not None and _parts.IS_INTERPRETED


def pytest_configure(config):
    # Where JAX has used the GPU before it in a thread, torch tells that it sets its context again.
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(autouse=IS_INTERPRETED)
def _interpreted(monkeypatch):
    """Triton's interpreter asks again where a kernel runs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
