"""Values to save, comparing them bit for bit, and doing damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import checkpoint


class Pair(NamedTuple):
    left: Any
    right: Any = None


checkpoint.register(Pair, "tests.Pair")


def value(seed: int = 0, big: int = 0) -> dict[str, Any]:
    """Every kind of leaf and node there is; `big` float32 numbers make a part of their own."""
    source = np.random.default_rng(seed)
    return {
        "params": [{"w": jnp.asarray(source.normal(size=(3, 5)), jnp.float32)}, {}],
        "pair": Pair(left=jnp.asarray(source.normal(size=(4,)), jnp.bfloat16), right=(None, 3)),
        "key": jax.random.key(seed),
        "old_key": jax.random.PRNGKey(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "scalars": (True, -7, 10**30, 0.1, float("nan"), float("-inf"), -0.0, "π"),
        "numbers": {
            "nan": np.asarray([np.nan, -0.0, np.inf], np.float32),
            "payload": np.asarray([0x7FC12345, 0xFFC00001], np.uint32).view(np.float32),
            "empty": np.zeros((0, 4), np.int16),
            "zero_rank": np.float32(2.5),
            "flags": np.asarray([True, False]),
            "small": jnp.asarray([-8, 7], jnp.int4),
            "eight": jnp.asarray([1.5, -2.0], jnp.float8_e4m3fn),
            "complex": np.asarray([1 + 2j], np.complex64),
            "wide": source.normal(size=(7,)),
        },
        "big": source.normal(size=(big,)).astype(np.float32),
    }


def bits(leaf: Any) -> Any:
    """What two leaves must have in common to be one: type, shape and bytes."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return ("key", str(jax.random.key_impl(leaf)), *bits(jax.random.key_data(leaf)))
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        array = np.asarray(leaf)
        return (str(array.dtype), array.shape, array.tobytes())
    return (type(leaf), leaf.hex() if isinstance(leaf, float) else leaf)


def assert_same(first: Any, second: Any) -> None:
    """Equal structure, types and bits."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True
    ):
        assert bits(a) == bits(b), jax.tree_util.keystr(path)


def files_of(folder: Path) -> list[Path]:
    """All plain files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def step_folder(root: Path, step: int) -> Path:
    return root / "steps" / f"{step:012d}"


def flip(file: Path, position: int, mask: int = 0x10) -> None:
    """Changes one byte in place, as a disk would: size and time stay."""
    with open(file, "r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ mask]))


def fail(error: BaseException) -> None:
    """For writers in tests: a failed save is a failed test."""
    raise error
