"""Pytrees of tensors to pytrees of arrays and back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from torch_bridge._convert._leaves import to_array, to_tensor
from torch_bridge._errors import BridgeError


def tree_to_jax(tree: Any, *, device: jax.Device | None = None, copy: bool | None = None) -> Any:
    """Return a pytree with JAX arrays in the place of torch tensors.

    Any containers JAX knows keep their type: dicts (a `state_dict` too), lists, tuples, named
    tuples, registered classes. Arrays of JAX and numpy, and plain numbers, stay as they are.

    **Shared memory.** With `copy=None` an array shares the tensor's memory where it can: the same
    device, a dtype both have, elements without gaps (transposed is fine), an address JAX can use.
    Such an array changes when torch writes into the tensor, as an optimiser's step does into
    parameters: use it up before, or take `copy=True`. The memory lives until both are gone, and
    `donate_argnums` does not hand it to XLA. Gradients do not cross: see `to_torch`.

    **Dtypes** stay, bfloat16, float16, 8-bit floats, bool and complex too. Without
    `jax_enable_x64`, int64 and uint64 become int32 and uint32 if every value fits, and float64 and
    complex128 are refused.

    Args:
      tree: a pytree of tensors.
      device: where the arrays go; JAX's CPU device by default, so that JAX takes no memory on
        torch's GPU.
      copy: True copies always, False never, None where it must.

    Returns:
      The pytree of arrays.

    Raises:
      BridgeError: for what cannot cross (sparse, quantised, meta, traced; no such dtype; values
        that do not fit), and for what would have to be copied when `copy` is False.

    Example:
      >>> tree = tree_to_jax({"w": torch.ones(2, 3), "labels": torch.tensor([1, 2])})
      >>> tree["w"].shape, tree["labels"].dtype.name
      ((2, 3), 'int32')
    """

    def leaf(path: Any, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return to_array(value, device, copy, _name(path, "the tensor"))
        return _check_leaf(path, value)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def tree_to_torch(
    tree: Any, *, device: torch.device | str | None = None, copy: bool | None = None
) -> Any:
    """Return a pytree with torch tensors in the place of JAX and numpy arrays.

    The reverse of `tree_to_jax`, by the same rules; dtypes never change (an int32 stays one).

    **JAX arrays cannot change, tensors can.** With `copy=None` a tensor shares the array's memory
    where it can; writing into it in place would change an array that JAX takes for constant, in
    every place that holds it. torch has no read-only tensors, so this cannot be refused for you:
    take `copy=True` for what you will write into, parameters above all.

    Args:
      tree: a pytree of arrays.
      device: where the tensors go; by default where the arrays are.
      copy: True copies always, False never, None where it must.

    Returns:
      The pytree of tensors.

    Raises:
      BridgeError: for what cannot cross (traced values, typed random keys, 4-bit integers,
        arrays on several devices), and for what would have to be copied when `copy` is False.

    Example:
      >>> tree_to_torch([jax.numpy.arange(3)], copy=True)
      [tensor([0, 1, 2], dtype=torch.int32)]
    """
    target = None if device is None else torch.device(device)

    def leaf(path: Any, value: Any) -> Any:
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            array = np.asarray(value) if isinstance(value, np.generic) else value
            return to_tensor(array, target, copy, _name(path, "the array"))
        return _check_leaf(path, value)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _check_leaf(path: Any, value: Any) -> Any:
    allowed = torch.Tensor | jax.Array | np.ndarray | np.generic | bool | int | float | complex
    if isinstance(value, allowed):
        return value
    raise BridgeError(
        f"{_name(path, 'the leaf')} is a {type(value).__name__}; a leaf must be a tensor, an array "
        "or a number; take it out, or register its class with jax.tree_util"
    )


def _name(path: Any, noun: str) -> str:
    return f"{noun} at tree{jax.tree_util.keystr(path)}" if path else noun
