"""The kernels run on a GPU where there is one, else in their interpreters."""

import sys

import pytest

_parts = sys.modules.get("esper_kernels.graft._triton_parts")  # as `tests/conftest.py` loaded it
IS_INTERPRETED = _parts is not None and _parts.IS_INTERPRETED


@pytest.fixture(autouse=IS_INTERPRETED)
def _interpreted(monkeypatch):
    """Triton's interpreter asks again where a kernel runs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
