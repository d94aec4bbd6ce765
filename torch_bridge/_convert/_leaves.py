"""One tensor to one array and back, by DLPack."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from torch_bridge._convert._devices import cpu_device
from torch_bridge._errors import BridgeError

JAX_DTYPES: dict[torch.dtype, Any] = {
    getattr(torch, name): jnp.dtype(name).type
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2"),
    )
}
"""What both frameworks have, by torch's dtype."""
TORCH_DTYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(jax_dtype): torch_dtype for torch_dtype, jax_dtype in JAX_DTYPES.items()
}
_NARROWED = {torch.int64: np.int32, torch.uint64: np.uint32}
_WIDE = (torch.int64, torch.uint64, torch.float64, torch.complex128)


def has_64_bits() -> bool:
    """Tell whether JAX's 64-bit numbers are switched on here."""
    return bool(jax.dtypes.canonicalize_dtype(np.int64) == np.int64)


def jax_dtype(tensor: torch.Tensor, what: str) -> Any:
    """Return the dtype that a tensor has as a JAX array.

    The same as the tensor's; without `jax_enable_x64`, int64 becomes int32 and uint64 uint32.

    Args:
      tensor: any tensor, a fake one too.
      what: names the tensor in messages.

    Raises:
      BridgeError: if JAX has no such dtype, or has float64 and complex128 switched off.
    """
    if tensor.dtype not in JAX_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in JAX_DTYPES)
        raise BridgeError(
            f"{what} has the dtype {tensor.dtype}, which JAX lacks; allowed: {allowed}; convert "
            "it first"
        )
    if tensor.dtype in _WIDE and not has_64_bits():
        if tensor.dtype not in _NARROWED:
            raise BridgeError(
                f"{what} has the dtype {tensor.dtype}, and JAX's 64-bit numbers are switched off; "
                "convert it (`.float()`), or call jax.config.update('jax_enable_x64', True) before "
                "anything else in JAX"
            )
        return _NARROWED[tensor.dtype]
    return JAX_DTYPES[tensor.dtype]


def torch_dtype(dtype: Any, what: str) -> torch.dtype:
    """Return torch's name of a JAX dtype.

    Raises:
      BridgeError: if torch has no such dtype, as for 4-bit integers and typed random keys.
    """
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise BridgeError(
            f"{what} is a typed random key, which torch lacks; pass jax.random.key_data(key), and "
            "on the side of JAX jax.random.wrap_key_data(...)"
        )
    if np.dtype(dtype) not in TORCH_DTYPES:
        allowed = ", ".join(sorted(dtype.name for dtype in TORCH_DTYPES))
        raise BridgeError(
            f"{what} has the dtype {dtype}, which torch lacks; allowed: {allowed}; convert it first"
        )
    return TORCH_DTYPES[np.dtype(dtype)]


def check_kind(tensor: torch.Tensor, what: str) -> None:
    """Refuse what is not one dense block of numbers.

    Raises:
      BridgeError: for meta, sparse and nested tensors.
    """
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise BridgeError(
            f"{what} is {str(tensor.layout).removeprefix('torch.')}; only dense tensors can become "
            "JAX arrays: call .to_dense() first"
        )
    if tensor.is_meta:
        raise BridgeError(f"{what} is on the meta device and has no values; allocate it first")


def to_array(
    tensor: torch.Tensor, device: jax.Device | None, copy: bool | None, what: str
) -> jax.Array:
    """Return a tensor's values as an array on `device`, sharing memory if it can and may."""
    if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise BridgeError(
            f"{what} is a tensor that torch is tracing, not one with values; call the function "
            "through torch_bridge.to_torch, which torch can trace"
        )
    check_kind(tensor, what)
    dtype = jax_dtype(tensor, what)
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if JAX_DTYPES[tensor.dtype] is not dtype:
        tensor = _narrow(tensor, TORCH_DTYPES[np.dtype(dtype)], copy, what)
    device = cpu_device() if device is None else device
    # DLPack serves JAX with any order of axes, not with gaps or repetition.
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        _may_copy(copy, what, "is not dense in memory")
        tensor = tensor.contiguous()
    if device.platform == "cpu" and tensor.device.type != "cpu":
        _may_copy(copy, what, f"is on {tensor.device}, not on the CPU")
        tensor = tensor.cpu()
    array = jnp.from_dlpack(tensor)
    if copy is False and array.unsafe_buffer_pointer() != tensor.data_ptr() and tensor.numel():
        raise BridgeError(
            f"{what} starts at an address that JAX cannot use in place (it wants multiples of 16 "
            "bytes or more); allow a copy with copy=None"
        )
    if array.devices() != {device}:
        _may_copy(copy, what, f"is on {tensor.device}, not on {device}")
        array = jax.device_put(array, device)
    elif copy:
        array = jnp.array(array, copy=True)
        array.block_until_ready()  # until then the copy still reads torch's memory
    return array


def to_tensor(
    array: Any, device: torch.device | None, copy: bool | None, what: str
) -> torch.Tensor:
    """Return an array's values as a tensor on `device`, sharing memory if it can and may."""
    if isinstance(array, jax.core.Tracer):
        raise BridgeError(
            f"{what} is a value that JAX is tracing, not one with numbers; convert it outside of "
            "jitted functions, or in a jax.pure_callback"
        )
    dtype = torch_dtype(array.dtype, what)
    if isinstance(array, jax.Array):
        if len(array.devices()) > 1:
            raise BridgeError(
                f"{what} lies on {len(array.devices())} devices; gather it first, as with "
                "jax.device_get"
            )
        tensor = torch.from_dlpack(jax.block_until_ready(array))
    else:
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            _may_copy(copy, what, "is a numpy array that is read-only or has negative strides")
            array = array.copy()
            copy = None
        is_numpys = array.dtype.isbuiltin == 1  # bfloat16 and others come from JAX
        bits = array if is_numpys else array.view(f"u{array.dtype.itemsize}")
        tensor = torch.from_numpy(bits).view(dtype)
    if device is not None and _differ(tensor.device, device):
        _may_copy(copy, what, f"is on {tensor.device}, not on {device}")
        return tensor.to(device)
    return tensor.clone() if copy else tensor


def _narrow(tensor: torch.Tensor, dtype: torch.dtype, copy: bool | None, what: str) -> torch.Tensor:
    """Return 64-bit integers as 32-bit ones, having looked whether they fit."""
    _may_copy(copy, what, f"is {tensor.dtype}, and JAX's 64-bit numbers are switched off")
    if not tensor.numel():
        return tensor.to(dtype)
    limits = torch.iinfo(dtype)
    # torch cannot compare unsigned 64-bit integers on every device; int64 orders those that fit.
    low, high = (int(value) for value in torch.aminmax(tensor.view(torch.int64)))
    if low < limits.min or high > limits.max:
        raise BridgeError(
            f"{what} is {tensor.dtype} with values from {low} to {high}; without 64-bit numbers "
            f"JAX holds {limits.min} to {limits.max}; scale it, or call "
            "jax.config.update('jax_enable_x64', True) before anything else in JAX"
        )
    return tensor.to(dtype)


def _may_copy(copy: bool | None, what: str, why: str) -> None:
    if copy is False:
        raise BridgeError(f"{what} {why}, so it must be copied; allow that with copy=None")


def _differ(current: torch.device, target: torch.device) -> bool:
    is_elsewhere = target.index is not None and current.index != target.index
    return current.type != target.type or is_elsewhere
