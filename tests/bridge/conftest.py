"""One thread, so that tests side by side do not wait for each other, and fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import jax
import pytest

HAS_TORCH = find_spec("torch") is not None
if not HAS_TORCH:
    collect_ignore_glob = ["test_[!t]*.py", "test_tr*.py", "test_to_*.py"]  # all but torch_absent


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lifecycles of one shape are compiled once, by whichever worker comes first."""
    folder = tmp_path_factory.getbasetemp().parent / "esper-bridge-jax"
    told = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in told}
    for name, value in told.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


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
