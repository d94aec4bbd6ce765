"""The kernels run on a GPU where there is one, else in their interpreters."""

from importlib.util import find_spec

import pytest

HAS_TRITON = find_spec("torch") is not None and find_spec("triton") is not None
INTERPRET = "TRITON_INTERPRET"


def _should_interpret():
    import torch

    return not torch.cuda.is_available()


IS_INTERPRETED = HAS_TRITON and _should_interpret()

if IS_INTERPRETED:
    # Triton reads it where a kernel is defined, so the kernels are imported under it, once.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INTERPRET, "1")
        import esper_kernels.graft.triton_cuda
        import esper_kernels.potential.triton_cuda  # noqa: F401


@pytest.fixture(autouse=IS_INTERPRETED)
def _interpreted(monkeypatch):
    """Triton's interpreter asks again where a kernel runs."""
    monkeypatch.setenv(INTERPRET, "1")
