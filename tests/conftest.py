"""Loads Triton first, and for its interpreter where there is no GPU.

Triton decides that once, where it and the kernels are imported, and some tests import what imports
it (torch's compiler, trainers): so it comes before all of them.
"""

from importlib.util import find_spec

import pytest

HAS_TRITON = find_spec("torch") is not None and find_spec("triton") is not None


def _has_gpu():
    import torch

    return torch.cuda.is_available()


if HAS_TRITON and not _has_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import esper_kernels.graft.triton_cuda
        import esper_kernels.potential.triton_cuda  # noqa: F401
