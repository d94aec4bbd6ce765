"""Dictionaries with keys of any type, and NNX models with lists: bit for bit, right types."""

from __future__ import annotations

import enum
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_support import assert_same, bits
from flax import nnx

from esper_fn import checkpoint
from esper_fn.checkpoint._files import num_disk_bytes
from esper_fn.errors import CheckpointError
from esper_fn.lifecycle import Stage


class Color(enum.Enum):
    RED = "r"
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Unregistered(enum.Enum):
    ONLY = 0


for _kind in (Color, Level, Word, Right):
    checkpoint.register(_kind, f"tests.{_kind.__name__}")


def same(first: Any, second: Any) -> None:
    """Equal to the last bit, keys of the same types in the same order (JAX cannot sort them)."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert [(type(k), repr(k)) for k in first] == [(type(k), repr(k)) for k in second]
        for a, b in zip(first.values(), second.values(), strict=True):
            same(a, b)
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            same(a, b)
    else:
        assert bits(first) == bits(second)


TREE: dict[Any, Any] = {
    0: np.asarray([np.nan, -0.0], np.float32),
    -3: {True: np.float64(0.1), False: jnp.ones(2, jnp.bfloat16)},
    10**40: 1,
    "0": np.arange(3),
    "a/b": {None: 2.5},
    1.5: "x",
    float("inf"): [{2: True}],
    Color.RED: {Color.BLUE: np.zeros(0)},
    Level.LOW: 1,
    Word.YES: 2,
    Right.READ: 3,
    Right.READ | Right.WRITE: 4,
    Right(0): 5,
    (1, "a", (True, Color.RED)): np.int8(3),
    b"\x00\xff": 6,
    np.int64(77): 7,
    np.float32(0.1): 8,
    np.True_: {Stage.TRAINING: jax.random.key(1)},
}


def test_every_key_comes_back_with_its_type(tmp_path: Path) -> None:
    tree = TREE
    checkpoint.check(tree)
    checkpoint.save(tmp_path, 1, tree)
    back = checkpoint.restore(tmp_path).value
    expected = {**tree, -3: {True: np.asarray(0.1), False: np.asarray(jnp.ones(2, jnp.bfloat16))}}
    expected[(1, "a", (True, Color.RED))] = np.asarray(np.int8(3))
    same(expected, back)
    assert checkpoint.restore(tmp_path, only="-3/True").value == 0.1
    assert checkpoint.restore(tmp_path, only="RED/BLUE").value.shape == (0,)
    with pytest.raises(CheckpointError, match="2 keys of other types are called '0'"):
        checkpoint.restore(tmp_path, only="0")


def test_an_enum_that_is_not_registered_needs_an_example(tmp_path: Path) -> None:
    tree = {"a": {Unregistered.ONLY: np.ones(2)}}
    checkpoint.check(tree)
    checkpoint.save(tmp_path, 1, tree)
    with pytest.raises(CheckpointError, match=r"Unregistered'.*call `checkpoint\.register"):
        checkpoint.restore(tmp_path)
    same(tree, checkpoint.restore(tmp_path, like={"a": {Unregistered.ONLY: 0}}).value)


def test_parts_below_keys_of_any_type_are_stored_apart(tmp_path: Path) -> None:
    host = {1: np.random.default_rng(0).normal(size=1 << 18), Color.RED: np.ones(1)}
    with checkpoint.Writer(tmp_path) as writer:
        for step in range(2):
            writer.save(step, {5: host, "step": step}, parts=("5",))
    assert num_disk_bytes(tmp_path) < 1.5 * host[1].nbytes
    same(host, checkpoint.restore(tmp_path, only="5").value)


def test_nnx_models_with_lists_come_back(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(11)])
            self.adapter = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.relu)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    like = nnx.split(Model(nnx.Rngs(1)))[1]
    plain = nnx.to_pure_dict(state)
    checkpoint.check({"state": state, "plain": plain})
    checkpoint.save(tmp_path, 1, {"state": state, "plain": plain})
    assert_same(jax.tree.map(_on_host, plain), checkpoint.restore(tmp_path, only="plain").value)
    back = checkpoint.restore(tmp_path, like={"state": like, "plain": None}).value["state"]
    assert_same(state, back)
    nnx.merge(graph, back)


def _on_host(leaf: Any) -> Any:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else np.asarray(leaf)


def nested(depth: int, leaf: Any = 1) -> Any:
    for _ in range(depth):
        leaf = [leaf]
    return leaf


UNSAVEABLE = {
    "a leaf of another kind": ({"a": {1: object()}}, "a/1: a builtins.object is neither"),
    "a key of another kind": ({"a": {1j: 1}}, "a: the dictionary key 1j is a builtins.complex"),
    "keys in a circle of tuples": (
        {((((((((((1,),),),),),),),),),): 1},
        "the dictionary key .* is a builtins.tuple",
    ),
    "a dictionary JAX cannot take apart": (
        {"a": defaultdict(int, {1: 1, "b": 2})},
        "a: JAX cannot take this collections.defaultdict apart",
    ),
    "too deep": (nested(101), "nested deeper than 100"),
    "a rank too high": ({"a": np.ones((1,) * 33)}, "a: an array of rank 33, at most 32"),
    "an int too long": ({"a": 10**5000}, "a: an int of 16610 bits"),
    "a mask": ({"a": np.ma.masked_array([1, 2], [0, 1])}, "a: a masked array would lose its mask"),
}


@pytest.mark.parametrize("name", UNSAVEABLE)
def test_what_would_not_come_back_is_refused_by_its_path(tmp_path: Path, name: str) -> None:
    tree, message = UNSAVEABLE[name]
    for call in (lambda: checkpoint.check(tree), lambda: checkpoint.save(tmp_path, 1, tree)):
        with pytest.raises(CheckpointError, match=message):
            call()
    assert checkpoint.steps(tmp_path) == []


def test_what_lies_in_a_circle_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(CheckpointError, match="nested deeper than 100"):
        checkpoint.check(circle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": {"a": float("nan")}}, "record: "),
        ({"record": {1: 0, "1": 0}}, "are one in JSON"),
        ({"record": nested(300)}, "record: "),
        ({"metrics": {"loss": "low"}}, r"metrics\['loss'\] must be a number, got str"),
        ({"metrics": {1: 0.5}}, "strings for names, got 1"),
    ],
)
def test_records_and_metrics_that_would_not_come_back(
    tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check({}, **options)
    with checkpoint.Writer(tmp_path) as writer, pytest.raises(CheckpointError, match=message):
        writer.save(1, {}, **options)


def test_the_deepest_and_longest_that_is_saved_comes_back(tmp_path: Path) -> None:
    tree = {"deep": nested(99), "long": 10**3900, "ordered": OrderedDict({"b": 1, "a": 2})}
    checkpoint.check(tree)
    checkpoint.save(tmp_path, 1, tree)
    back = checkpoint.restore(tmp_path, like=tree).value
    same(tree, back)
