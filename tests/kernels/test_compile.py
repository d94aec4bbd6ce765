"""The Triton kernels compile for a GPU, also where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
BOTH = {"forward_kernel", "in_place_kernel", "backward_kernel", "reduce_kernel"}


@pytest.mark.parametrize(
    ("spec", "dtype", "more"),
    [
        ("vision", "bfloat16", {"watch_kernel", "watch_in_place_kernel"}),
        ("gated_remainder", "bfloat16", {"watch_in_place_kernel"}),
        ("odd", "float32", {"watch_in_place_kernel"}),
    ],
)
def test_compiles_for_hopper(spec, dtype, more, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, SCRIPT, spec, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert BOTH | more <= compiled
