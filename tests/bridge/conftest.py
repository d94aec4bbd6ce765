"""One thread, so that tests side by side do not wait for each other, and fixed seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

HAS_TORCH = find_spec("torch") is not None
if not HAS_TORCH:
    collect_ignore_glob = ["test_[!t]*.py", "test_tr*.py", "test_to_*.py"]  # all but torch_absent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    if not HAS_TORCH:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels' reference serves a CPU, not Triton's interpreter, which may be loaded."""
    from torch_bridge.backends import _statistics

    if (kernel := sys.modules.get("esper_kernels.graft.triton_cuda")) is not None:
        monkeypatch.setattr(kernel, "IS_INTERPRETED", False)
    _statistics.KERNEL_DEVICES.add("cpu")
    yield
    _statistics.KERNEL_DEVICES.discard("cpu")
