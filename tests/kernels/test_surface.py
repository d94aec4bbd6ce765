"""What is loaded when, what is public, and tile sizes as a pure function."""

import subprocess
import sys
from dataclasses import replace

import pytest

from esper_kernels.graft import Case
from esper_kernels.graft._blocks import backward_tiles, forward_tiles, in_place_tiles
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
        "explain_potential",
        "forward",
        "forward_in_place",
        "graft",
        "potential",
    }
    assert set(esper_kernels.torch.__all__) == {
        "Calls",
        "bind",
        "explain",
        "explain_potential",
        "graft",
        "graft_",
        "potential",
        "watch",
    }


@pytest.mark.parametrize("choose", [forward_tiles, backward_tiles, in_place_tiles])
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
        (64, 4, 4, 3, True),
        (64, 4, 4, 5, True),
        (128, 2, 8, 3, True),
    ]


def test_potential_for_jax():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from implementations import strictly

    from esper_kernels.jax import potential

    source = np.random.default_rng(0)
    x, dy = source.standard_normal((2, 20, 11)).astype(np.float32)
    asked = np.array([True, True, False])
    with strictly():
        sizes = jax.jit(potential)(jnp.asarray(x), jnp.asarray(dy), jnp.asarray(asked))
    chunks = zip(np.array_split(x, 3, axis=1), np.array_split(dy, 3, axis=1), strict=True)
    right = [np.square(u.T @ slope).sum() for u, slope in chunks]
    np.testing.assert_allclose(sizes, right * asked, rtol=1e-4)


def _jax_arguments():
    import jax
    import jax.numpy as jnp

    from esper_kernels import Adapter

    shape = jax.ShapeDtypeStruct
    adapter = Adapter(down=shape((2, 8, 4), jnp.float32), up=shape((2, 4, 8), jnp.float32))
    return shape((6, 16), jnp.float32), adapter, shape((2,), jnp.int32), shape((2, 4), jnp.float32)


def test_explain_for_jax_while_tracing():
    import jax
    import jax.numpy as jnp

    from esper_kernels.jax import explain, explain_potential

    chosen = []

    def trace(x, adapter, slot, gains):
        chosen.append(explain(x, adapter, slot, gains))
        chosen.append(explain_potential(x, x, slot == 0))
        return x

    given = _jax_arguments()
    jax.eval_shape(trace, *given)
    chosen.append(explain(*given))
    asked = jax.ShapeDtypeStruct((2,), jnp.bool_)
    chosen.append(explain_potential(given[0], given[0], asked))
    assert [choice.operation for choice in chosen] == ["graft", "potential"] * 2
    assert chosen[0] == chosen[2]
    assert chosen[1] == chosen[3]
    assert chosen[1].refusals == {"pallas": "no kernel is built"}


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


def test_explain_potential_for_torch():
    torch = pytest.importorskip("torch")
    from esper_kernels import UnavailableError
    from esper_kernels.torch import explain_potential

    x, asked = torch.ones(4, 600), torch.ones(2, dtype=torch.bool)
    choice = explain_potential(x, x, asked)
    assert choice.implementation == "reference"
    with pytest.raises(UnavailableError, match="potential"):
        explain_potential(x, x, asked, implementation="triton")


def test_triton_refuses_old_gpus_for_both_operations(monkeypatch):
    torch = pytest.importorskip("torch")
    from esper_kernels._torch_choice import refuses_triton
    from esper_kernels.graft import _operations
    from esper_kernels.potential import torch as potential_torch

    class Old:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    case = replace(HEADLINE, device="Tesla T4")
    for module in (_operations.TRITON, potential_torch._TRITON):
        assert "Tesla T4 has no bfloat16 matrix units" in refuses_triton(module, case, Old())
