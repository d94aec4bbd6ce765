"""Trees of small arrays as one array, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from torch_bridge._packing import ArrayPacker


def tree(impl: str = "threefry2x32") -> dict[str, Any]:
    return {
        "real": jnp.asarray([-0.0, jnp.nan, jnp.inf, 1e-42], jnp.float32),
        "half": jnp.asarray([[1.5, -2.0]], jnp.bfloat16),
        "small": jnp.asarray([-128, 127], jnp.int8),
        "flag": jnp.asarray([True, False]),
        "whole": jnp.asarray(2**32 - 1, jnp.uint32),
        "none": jnp.zeros((0, 3), jnp.int32),
        "key": jax.random.key(7, impl=impl),
    }


def raw(leaf: Any) -> tuple[Any, ...]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.shape, array.dtype, array.tobytes()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_every_bit_comes_back(impl: str) -> None:
    arguments = tree(impl)
    words = ArrayPacker(jax.eval_shape(lambda: arguments))
    packed = jax.jit(words.pack)(arguments)
    assert packed.dtype == jnp.int32
    assert packed.ndim == 1
    back, read = jax.jit(words.unpack)(packed), words.read(np.asarray(packed))
    for name, leaf in arguments.items():
        assert raw(back[name]) == raw(leaf), name
        assert raw(read[name]) == raw(leaf), name
    assert jax.random.key_impl(back["key"]) == jax.random.key_impl(arguments["key"])


def test_wide_leaves_are_refused() -> None:
    with pytest.raises(TypeError, match="float64 has more than 32 bits"):
        ArrayPacker({"wide": jax.ShapeDtypeStruct((2,), np.dtype("float64"))})
