"""What all tests share: one cache of compiled programs, and Triton loaded first.

XLA compiles most of a run's time, and the same small programs in every process: so they are kept in
`.cache/jax`, for all workers, all processes that tests start, and the next run.

Triton decides where it and the kernels are imported whether it interprets, and some tests import
what imports it (torch's compiler, trainers): so it comes before all of them.
"""

import hashlib
import os
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_MOST_BYTES = 2 * 1024**3


def _cache_folder():
    """A folder for this JAX on this kind of processor, for which XLA compiles."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = "".join(line for line in lines if line.startswith(("flags", "Features")))[:10_000]
    processor = hashlib.sha256(features.encode()).hexdigest()[:8]
    return ROOT / ".cache" / "jax" / f"{version('jaxlib')}-{processor}"


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        return
    folder = ROOT / ".cache" / "jax"
    if sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > _MOST_BYTES:
        shutil.rmtree(folder, ignore_errors=True)


for _name, _value in {
    "JAX_COMPILATION_CACHE_DIR": str(_cache_folder()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(_name, _value)

HAS_TRITON = find_spec("torch") is not None and find_spec("triton") is not None


def _has_gpu():
    import torch

    return torch.cuda.is_available()


if HAS_TRITON and not _has_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import esper_kernels.graft.triton_cuda
        import esper_kernels.potential.triton_cuda  # noqa: F401
