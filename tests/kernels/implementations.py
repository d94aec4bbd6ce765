"""Every implementation behind one face, numpy in and float64 out; and the float64 truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import esper_kernels.graft.jax as graft_jax
import esper_kernels.graft.torch as graft_torch
from esper_kernels import Adapter, UnavailableError
from esper_kernels.graft import check, reference_torch
from esper_kernels.graft._specs import Inputs, Spec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("bfloat16", "float32")


class Outcome(NamedTuple):
    """All results of forward and backward; float64, None for what an adapter lacks."""

    y: np.ndarray
    watched: np.ndarray
    dx: np.ndarray
    down: np.ndarray
    up: np.ndarray
    bias: np.ndarray | None
    gate: np.ndarray | None
    channels: np.ndarray


Runner = Callable[[Spec, Inputs, str], Outcome]


def _torch(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE, dtype)


def _wide(leaf: Any) -> Any:
    if leaf is None:
        return None
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().double().cpu().numpy()
    return np.float64(leaf)


def torch_arguments(spec: Spec, inputs: Inputs, dtype: str) -> tuple[Any, ...]:
    """`x, adapter, slot, gains` on the device; the adapter stays float32."""
    del spec
    leaves = (inputs.down, inputs.up, inputs.bias, inputs.gate)
    adapter = Adapter(*(None if leaf is None else _torch(leaf) for leaf in leaves))
    x = _torch(inputs.x, getattr(torch, dtype))
    return x, adapter, _torch(inputs.slot), _torch(inputs.gains)


def run_torch(implementation: str) -> Runner:
    """An implementation for torch, through autograd."""

    def run(spec: Spec, inputs: Inputs, dtype: str) -> Outcome:
        x, adapter, slot, gains = torch_arguments(spec, inputs, dtype)
        tap = torch.zeros((spec.chunks, 5), device=DEVICE)
        for leaf in (x, tap, *adapter):
            if leaf is not None:
                leaf.requires_grad_()
        y, watched = graft_torch.graft(
            x,
            adapter,
            slot,
            gains,
            tap,
            activation=spec.activation,
            implementation=implementation,
        )
        y.backward(_torch(inputs.dy, y.dtype))
        d_adapter = (None if leaf is None else _wide(leaf.grad) for leaf in adapter)
        return Outcome(_wide(y), _wide(watched), _wide(x.grad), *d_adapter, _wide(tap.grad))

    return run


@contextmanager
def strictly() -> Iterator[None]:
    """JAX as strict as it gets, and float32 products that a GPU does not round to tf32."""
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.default_matmul_precision("highest"),
    ):
        yield


@partial(jax.jit, static_argnames=("activation", "implementation"))
def _both(x: Any, adapter: Adapter, tap: Any, dy: Any, slot: Any, gains: Any, **static: str) -> Any:
    def grow(x: Any, adapter: Adapter, tap: Any) -> Any:
        return graft_jax.graft(x, adapter, slot, gains, tap, **static)

    (y, watched), pull = jax.vjp(grow, x, adapter, tap)
    return y, watched, pull((dy, jnp.zeros_like(watched)))


def run_jax(implementation: str) -> Runner:
    """An implementation for JAX, jitted, through its custom derivative."""

    def run(spec: Spec, inputs: Inputs, dtype: str) -> Outcome:
        adapter = Adapter(*(None if a is None else jnp.asarray(a) for a in inputs[2:6]))
        slot, gains = jnp.asarray(inputs.slot), jnp.asarray(inputs.gains)
        static = {"activation": spec.activation, "implementation": implementation}
        x, dy = (jnp.asarray(a).astype(dtype) for a in (inputs.x, inputs.dy))
        with strictly():
            results = _both(x, adapter, jnp.zeros((spec.chunks, 5)), dy, slot, gains, **static)
        y, watched, (dx, d_adapter, channels) = results
        d_leaves = (_wide(leaf) for leaf in d_adapter)
        return Outcome(_wide(y), _wide(watched), _wide(dx), *d_leaves, _wide(channels))

    return run


@partial(jax.jit, donate_argnums=0, static_argnames=("activation", "implementation"))
def _forward_in_place(x: Any, adapter: Adapter, slot: Any, gains: Any, **static: str) -> Any:
    return graft_jax.forward_in_place(x, adapter, slot, gains, **static)


@partial(jax.jit, donate_argnums=1, static_argnames=("activation", "implementation"))
def _backward_in_place(
    x: Any, dy: Any, adapter: Adapter, slot: Any, gains: Any, watched: Any, **static: str
) -> Any:
    return graft_jax.backward_in_place(x, dy, adapter, slot, gains, watched, **static)


def run_jax_in_place(implementation: str) -> Runner:
    """An implementation for JAX in place, `x` and `dy` given up."""

    def run(spec: Spec, inputs: Inputs, dtype: str) -> Outcome:
        adapter = Adapter(*(None if a is None else jnp.asarray(a) for a in inputs[2:6]))
        slot, gains = jnp.asarray(inputs.slot), jnp.asarray(inputs.gains)
        static = {"activation": spec.activation, "implementation": implementation}
        x, dy = (jnp.asarray(a).astype(dtype) for a in (inputs.x, inputs.dy))
        with strictly():
            y, watched = _forward_in_place(jnp.copy(x), adapter, slot, gains, **static)
            dx, d_adapter, channels = _backward_in_place(
                x, dy, adapter, slot, gains, watched, **static
            )
        d_leaves = (_wide(leaf) for leaf in d_adapter)
        return Outcome(_wide(y), _wide(watched), _wide(dx), *d_leaves, _wide(channels))

    return run


RUNNERS: dict[str, Runner] = {
    "torch-reference": run_torch("reference"),
    "torch-triton": run_torch("triton"),
    "jax-reference": run_jax("reference"),
    "jax-pallas": run_jax("pallas"),
}


IN_PLACE: dict[str, Runner] = {
    "jax-reference": run_jax_in_place("reference"),
    "jax-pallas": run_jax_in_place("pallas"),
}


def rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """What an implementation's framework makes of float32 numbers."""
    if name.startswith("torch"):
        return _wide(_torch(array, getattr(torch, dtype)))
    return _wide(jnp.asarray(array).astype(dtype))


def truth(spec: Spec, inputs: Inputs, dtype: str) -> Outcome:
    """The definition in float64, of the numbers that the dtype holds."""

    def rounded(array: np.ndarray | None) -> Any:
        return None if array is None else _torch(array, getattr(torch, dtype)).double()

    x, dy = rounded(inputs.x), rounded(inputs.dy)
    adapter = Adapter(*(rounded(leaf) for leaf in inputs[2:6]))
    slot, gains = _torch(inputs.slot), _torch(inputs.gains)
    narrow = Adapter(*(None if leaf is None else leaf.float() for leaf in adapter))
    case = check(x.float(), narrow, slot, gains, activation=spec.activation, device="cpu")
    y, watched = reference_torch.forward(case, x, adapter, slot, gains.double())
    dx, d_adapter, channels = reference_torch.backward(
        case, x, dy, adapter, slot, gains.double(), watched
    )
    return Outcome(*map(_wide, (y, watched, dx, *d_adapter, channels)))


def refusal(name: str, spec: Spec, dtype: str) -> str | None:
    """Why an implementation cannot serve a spec here, None if it can."""
    framework, implementation = name.split("-")
    inputs = spec_shapes(spec, dtype, framework)
    explain = graft_torch.explain if framework == "torch" else graft_jax.explain
    try:
        explain(*inputs, activation=spec.activation, implementation=implementation)
    except UnavailableError as error:
        return str(error)
    return None


def spec_shapes(spec: Spec, dtype: str, framework: str) -> tuple[Any, ...]:
    """`x, adapter, slot, gains` without values."""

    def array(dtype: str, *shape: int) -> Any:
        if framework == "torch":
            return torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    matrix = (spec.slots, spec.width, spec.rank)
    adapter = Adapter(
        down=array("float32", *matrix),
        up=array("float32", spec.slots, spec.rank, spec.width),
        bias=array("float32", spec.slots, spec.rank) if spec.has_bias else None,
        gate=array("float32", *matrix) if spec.activation == "gated" else None,
    )
    x = array(dtype, spec.rows, spec.features)
    return x, adapter, array("int32", spec.chunks), array("float32", spec.chunks, 4)
