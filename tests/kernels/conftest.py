"""The kernels run on a GPU where there is one, else in their interpreters."""

import sys

import pytest

_parts = sys.modules.get("esper_kernels.graft._triton_parts")  # as `tests/conftest.py` loaded it
IS_INTERPRETED = _parts is not None and _parts.IS_INTERPRETED
_CLEAN = {}


def pytest_configure(config):
    # Where JAX has used the GPU before it in a thread, torch tells that it sets its context again.
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(autouse=IS_INTERPRETED)
def _interpreted(monkeypatch):
    """Triton's interpreter asks again where a kernel runs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=["torch-reference", "torch-triton", "jax-reference", "jax-pallas"])
def name(request):
    """The name of an implementation of `graft`."""
    return request.param


@pytest.fixture
def run(name):
    """An implementation: `run(spec, inputs, dtype)`."""
    from conformance import runner
    from implementations import RUNNERS

    return runner(RUNNERS, name)


@pytest.fixture
def clean(name, run):
    """What an implementation makes of the plain spec, computed once."""
    from conformance import PLAIN, draw

    if name not in _CLEAN:
        _CLEAN[name] = run(PLAIN, draw(PLAIN))
    return _CLEAN[name]


@pytest.fixture
def run_in_place(name):
    """An implementation in place."""
    from conformance import runner
    from implementations import IN_PLACE

    if name not in IN_PLACE:
        pytest.skip("only JAX has forms in place")
    return runner(IN_PLACE, name)
