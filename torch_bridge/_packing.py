"""Many small arrays as one: a compiled program takes longer to start with each array it handles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class ArrayPacker:
    """How a pytree of arrays becomes `int32[W]`, bit for bit, and comes back.

    Args:
      like: a pytree of arrays or of `jax.ShapeDtypeStruct`. Its leaves are keys, or have 32 bits at
        most an entry.
    """

    def __init__(self, like: Any) -> None:
        leaves, self._structure = jax.tree.flatten(like)
        self._leaves = [_Leaf(leaf) for leaf in leaves]
        self._ends = np.cumsum([leaf.size for leaf in self._leaves]).tolist()
        fields = [(f"{k}", leaf.stored, leaf.shape) for k, leaf in enumerate(self._leaves)]
        self._record = np.dtype(fields)

    def pack(self, tree: Any) -> jax.Array:
        """The words of such a tree."""
        leaves = zip(self._leaves, jax.tree.leaves(tree), strict=True)
        return jnp.concatenate([form.pack(leaf) for form, leaf in leaves])

    def unpack(self, words: jax.Array) -> Any:
        """The tree, of JAX arrays."""
        parts = jnp.split(words, self._ends[:-1])
        leaves = [form.unpack(part) for form, part in zip(self._leaves, parts, strict=True)]
        return jax.tree.unflatten(self._structure, leaves)

    def read(self, words: np.ndarray) -> Any:
        """The tree, of NumPy arrays; keys as `jax.random.key_data` has them."""
        record = words.view(self._record)[0]
        leaves = [form.read(record[k]) for k, form in enumerate(self._leaves)]
        return jax.tree.unflatten(self._structure, leaves)


class _Leaf:
    def __init__(self, like: Any) -> None:
        self._is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        impls: list[Any] = []

        def look(key: Any) -> Any:
            # Of a key, or of what stands for one while JAX traces; a shape has none.
            impls.append(jax.random.key_impl(key))
            return jax.random.key_data(key)

        data = jax.eval_shape(look, like) if self._is_key else like
        self._impl = impls[0] if impls else None
        self._dtype = np.dtype(data.dtype)
        if self._dtype.itemsize > 4:
            raise TypeError(f"{self._dtype} has more than 32 bits an entry")
        self._is_whole = self._dtype.itemsize == 4
        is_real = jnp.issubdtype(self._dtype, np.floating)
        self.stored = (
            self._dtype if self._is_whole else np.dtype(np.float32 if is_real else np.int32)
        )
        """The 32 bits an entry in which it is stored, which hold every value."""
        self.shape = data.shape
        self.size = int(np.prod(self.shape))

    def pack(self, leaf: Any) -> jax.Array:
        data = jax.random.key_data(leaf) if self._is_key else jnp.asarray(leaf)
        return jax.lax.bitcast_convert_type(data.astype(self.stored), np.int32).reshape(-1)

    def unpack(self, words: jax.Array) -> jax.Array:
        whole = jax.lax.bitcast_convert_type(words.reshape(self.shape), self.stored)
        data = whole.astype(self._dtype)
        return jax.random.wrap_key_data(data, impl=self._impl) if self._is_key else data

    def read(self, stored: Any) -> np.ndarray:
        """Its numbers in a record, an array even where they are a single number."""
        return np.asarray(stored) if self._is_whole else np.asarray(stored, self._dtype)
