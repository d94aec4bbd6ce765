"""The Triton kernels compile for a GPU, also where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

HERE = Path(__file__).parent
BOTH = {"forward_kernel", "backward_kernel", "reduce_kernel"}


@pytest.mark.parametrize(
    ("spec", "dtype", "more"),
    [
        ("vision", "bfloat16", {"statistics_kernel"}),
        pytest.param("gated_remainder", "bfloat16", set(), marks=pytest.mark.slow),
        pytest.param("odd", "float32", set(), marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper(spec, dtype, more, tmp_path):
    lines = lines_of("compile_kernels.py", tmp_path, spec, dtype)
    assert BOTH | more <= {line.split()[0] for line in lines}


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("mlp", "bfloat16"),
        pytest.param("vision", "bfloat16", marks=pytest.mark.slow),
        pytest.param("gated_remainder", "float32", marks=pytest.mark.slow),
    ],
)
def test_compiler_knows_what_kernels_write(spec, dtype, tmp_path):
    """Taken to write what they only read, they would be given copies of it."""
    once, twice = (
        lines_of("compiled_programs.py", tmp_path, spec, dtype, str(num)) for num in (1, 2)
    )
    gate = ["d_gate_ptr"] if spec.startswith("gated") else []
    gradients = ["d_bias_ptr", "d_down_ptr", *gate, "d_up_ptr", "out_ptr"]
    is_split = len(once) == 5
    assert once[:-1] == [
        " ".join(["forward_kernel", "sums_ptr" if is_split else "statistics_ptr", "y_ptr"]),
        *(["statistics_kernel statistics_ptr"] if is_split else []),
        "backward_kernel dx_ptr left_ptr",
        " ".join(["reduce_kernel", *gradients]),
    ]
    assert len(twice) == 2 * len(once) - 1
    assert once[-1] == twice[-1] == f"analysed {len(once) - 1}"


def lines_of(script, cache, *arguments):
    """What a script prints in a process whose Triton compiles."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, HERE / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
