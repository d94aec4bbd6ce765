"""Tensors and arrays of one GPU: they cross without a copy, in order, with their derivatives.

Needs JAX and torch on the same GPU, with JAX told so from outside: `JAX_PLATFORMS=cuda,cpu`.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from torch_bridge import to_torch, tree_to_jax, tree_to_torch


def _is_shared() -> bool:
    asks = os.environ.get("JAX_PLATFORMS", "").startswith("cuda")
    return torch.cuda.is_available() and asks and jax.default_backend() == "gpu"


pytestmark = pytest.mark.skipif(not _is_shared(), reason="needs JAX and torch on one GPU")
# torch's compiler warns of its own deprecated parts when it is first imported, in some versions.
COMPILER = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32]


def gpu() -> jax.Device:
    return jax.local_devices(backend="gpu")[0]


def own(x: jax.Array) -> int:
    return x.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_memory_is_the_same_both_ways(dtype: torch.dtype) -> None:
    x = torch.arange(6, device="cuda").reshape(2, 3).to(dtype)
    other = tree_to_jax({"x": x}, device=gpu(), copy=False)["x"]
    assert other.devices() == {gpu()}
    assert own(other) == x.data_ptr()
    back = tree_to_torch(other)
    assert back.device == x.device
    assert back.data_ptr() == x.data_ptr()
    assert torch.equal(back, x)


def test_a_copy_is_one_if_asked_for() -> None:
    x = torch.ones(3, device="cuda")
    assert own(tree_to_jax(x, device=gpu(), copy=True)) != x.data_ptr()


def test_work_in_flight_is_waited_for_both_ways() -> None:
    big = torch.randn(4096, 4096, device="cuda") / 64
    square = jax.jit(lambda m: m @ m)
    torch.cuda.synchronize()
    for _ in range(5):
        made = big @ big @ big
        results = tree_to_torch(square(tree_to_jax(made, device=gpu(), copy=False)))
        results = results + 0.0
        expected = made @ made
        assert float((results - expected).abs().max() / expected.abs().max()) < 1e-2


def adapter(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"] + p["b"]).sum(-1)


@COMPILER
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("is_beside", [False, True])
def test_a_jitted_function_is_called_and_differentiated(is_beside: bool, is_compiled: bool) -> None:
    torch.manual_seed(0)
    p = {
        "w": torch.randn(8, 4, device="cuda", requires_grad=True),
        "b": torch.randn(4, device="cuda", requires_grad=True),
    }
    x = torch.randn(16, 8, device="cuda", requires_grad=True)
    run = to_torch(jax.jit(adapter), device=gpu() if is_beside else None)
    run = torch.compile(run) if is_compiled else run
    y = run(p, x)
    assert y.is_cuda
    leaves = [p["w"], p["b"], x]
    results = torch.autograd.grad(y.square().sum(), leaves)
    wanted_y = torch.tanh(x @ p["w"] + p["b"]).sum(-1)
    expected = torch.autograd.grad(wanted_y.square().sum(), leaves)
    # Both libraries may multiply in TF32.
    torch.testing.assert_close(y, wanted_y, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results, expected, rtol=2e-2, atol=2e-2)
