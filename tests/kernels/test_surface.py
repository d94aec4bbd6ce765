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
    body_dtype="float32",
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
        "explain",
        "forward",
        "forward_in_place",
        "graft",
        "potential",
    }
    assert set(esper_kernels.torch.__all__) == {"explain", "graft", "graft_", "potential"}


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

    from esper_kernels.jax import potential

    source = np.random.default_rng(0)
    x, dy = source.standard_normal((2, 20, 11)).astype(np.float32)
    asked = np.array([True, True, False])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        sizes = jax.jit(potential)(jnp.asarray(x), jnp.asarray(dy), jnp.asarray(asked))
    chunks = zip(np.array_split(x, 3, axis=1), np.array_split(dy, 3, axis=1), strict=True)
    right = [np.square(u.T @ slope).sum() for u, slope in chunks]
    np.testing.assert_allclose(sizes, right * asked, rtol=1e-4)
