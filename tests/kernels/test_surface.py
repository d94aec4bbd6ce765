"""What is loaded when, what is public, and tile sizes as a pure function."""

import subprocess
import sys
from dataclasses import replace

import pytest

from esper_kernels.graft import Case
from esper_kernels.graft._blocks import backward_tiles, forward_tiles
from esper_kernels.graft._specs import SPECS

HEADLINE = Case(
    rows=16384,
    features=4096,
    chunks=64,
    slots=64,
    rank=16,
    dtype="bfloat16",
    adapter_dtype="float32",
    has_bias=True,
    activation="relu",
    device="NVIDIA H200",
)


@pytest.mark.parametrize(
    ("module", "foreign"),
    [
        ("esper_kernels", {"torch", "jax", "triton"}),
        ("esper_kernels.jax", {"torch", "triton"}),
        ("esper_kernels.torch", {"jax", "triton"}),
    ],
)
def test_loads_no_foreign_framework(module, foreign):
    pytest.importorskip(module.rpartition(".")[2])
    code = f"import sys, {module}; print({foreign!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_surface():
    pytest.importorskip("torch")
    import esper_kernels.jax
    import esper_kernels.torch

    assert set(esper_kernels.jax.__all__) == {
        "backward",
        "backward_in_place",
        "explain",
        "forward",
        "forward_in_place",
        "graft",
    }
    assert set(esper_kernels.torch.__all__) == {
        "Calls",
        "analyse_kernels_once",
        "bind",
        "explain",
        "graft",
        "watch",
    }


@pytest.mark.parametrize("choose", [forward_tiles, backward_tiles])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tiles_cover_any_shape(choose, spec):
    case = replace(
        HEADLINE,
        rows=max(spec.rows, 1),
        features=spec.features,
        chunks=spec.chunks,
        slots=spec.slots,
        rank=spec.rank,
        activation=spec.activation,
    )
    tiles = choose(case)
    assert tiles == choose(replace(case))
    assert tiles.rows >= 16
    assert tiles.splits >= 1
    assert not tiles.is_bulk or case.is_even


def test_headline_tiles_are_the_measured_ones():
    shapes = [
        (tiles.rows, tiles.splits, tiles.warps, tiles.stages, tiles.is_bulk)
        for case in (HEADLINE, replace(HEADLINE, rank=64))
        for tiles in (forward_tiles(case), backward_tiles(case))
    ]
    assert shapes == [
        (64, 4, 4, 4, True),
        (64, 4, 4, 4, True),
        (64, 4, 4, 5, True),
        (128, 2, 8, 3, True),
    ]


def _jax_arguments():
    import jax
    import jax.numpy as jnp

    from esper_kernels import Adapter

    shape = jax.ShapeDtypeStruct
    adapter = Adapter(down=shape((2, 8, 4), jnp.float32), up=shape((2, 4, 8), jnp.float32))
    return shape((6, 16), jnp.float32), adapter, shape((2,), jnp.int32), shape((2, 4), jnp.float32)


def test_explain_for_jax_while_tracing():
    import jax

    from esper_kernels.jax import explain

    chosen = []

    def trace(x, adapter, slot, gains):
        chosen.append(explain(x, adapter, slot, gains))
        return x

    arguments = _jax_arguments()
    jax.eval_shape(trace, *arguments)
    chosen.append(explain(*arguments))
    assert [choice.operation for choice in chosen] == ["graft"] * 2
    assert chosen[0] == chosen[1]


def test_jax_chooses_for_the_device_that_runs_the_call(monkeypatch):
    import jax
    import jax.numpy as jnp

    from esper_kernels._jax_device import device_name

    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H200"

    cpu = jax.devices("cpu")[0]
    x, shape = jax.device_put(jnp.ones(2), cpu), jax.ShapeDtypeStruct((2,), jnp.float32)
    monkeypatch.setattr(jax, "devices", lambda backend=None: [cpu if backend == "cpu" else Gpu()])
    assert device_name(shape) == "NVIDIA H200"
    assert device_name(x) == "cpu"
    for default in (cpu, "cpu"):
        with jax.default_device(default):
            assert device_name(shape) == "cpu"


def test_triton_refuses_old_gpus(monkeypatch):
    torch = pytest.importorskip("torch")
    from esper_kernels._torch_choice import refuses_triton
    from esper_kernels.graft import _operations

    class Old:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    case = replace(HEADLINE, device="Tesla T4")
    assert "Tesla T4 has no bfloat16 matrix units" in refuses_triton(
        _operations.TRITON, case, Old()
    )
