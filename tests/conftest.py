"""What all tests share: one cache of compiled programs, and Triton loaded first.

XLA compiles most of a run's time, and the same small programs in every process: so they are kept in
`.cache/jax`, for all workers, all processes that tests start, and the next run. It compiles them
without its optimisations, which is much faster; `TEST_OPTIMISED=1` compiles as for users. So does a
machine with an NVIDIA GPU, where programs without optimisations crash.

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


_LIMIT_SECONDS = float(os.environ.get("TEST_LIMIT_SECONDS", "inf"))
"""Processor time that a test without the marker `slow` may take, its fixtures and processes too."""


def _processor_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.began_at = _processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        seconds = _processor_seconds() - item.began_at
        if seconds > _LIMIT_SECONDS and item.get_closest_marker("slow") is None:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {seconds:.0f} s of processor time, more than "
                f"{_LIMIT_SECONDS:g}: make it smaller, share its programs, or mark it slow"
            )
    return report


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        return
    folder = ROOT / ".cache" / "jax"
    if sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > _MOST_BYTES:
        shutil.rmtree(folder, ignore_errors=True)


if not os.environ.get("TEST_OPTIMISED") and not Path("/dev/nvidiactl").exists():
    _quickly = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # later versions do not know this flag, and abort
        _quickly += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{_quickly} {os.environ.get('XLA_FLAGS', '')}".strip()

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
        import esper_kernels.graft.triton_cuda  # noqa: F401
