"""Values as JSON and arrays, and back: exact, closed, bounded."""

from __future__ import annotations

import contextlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_support import Pair, assert_same, value
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_fn as ef
from esper_fn import _records, checkpoint
from esper_fn.checkpoint import _json, _leaf, _structure
from esper_fn.errors import CheckpointError, CorruptCheckpointError


def through_json(tree: Any, like: Any = None) -> Any:
    structure, leaves, arrays = _structure.describe(tree)
    text = json.dumps([structure, [_leaf.leaf_to_json(leaf) for leaf in leaves]])
    structure, rows = json.loads(text)
    known = [_leaf.leaf_from_json(row) for row in rows]
    assert known == leaves
    values = list(map(_leaf.value_of, known, arrays))
    return _structure.build(structure, values, like)


def test_every_kind_of_leaf_and_node_comes_back() -> None:
    assert_same(value(), through_json(value()))


class Unknown(NamedTuple):
    x: Any


def test_a_type_that_is_not_registered_needs_an_example() -> None:
    tree = {"a": Unknown(np.ones(2))}
    with pytest.raises(CheckpointError, match=r"Unknown.*pass `like=`"):
        through_json(tree)
    assert_same(tree, through_json(tree, like={"a": Unknown(np.zeros(1))}))


def test_a_name_in_a_file_is_looked_up_and_never_imported() -> None:
    for name in ("os.system", "builtins.eval", "esper_fn.errors.EsperError", "__main__.X", ""):
        node = {"kind": "named", "name": name, "keys": ["a"], "children": [0]}
        with pytest.raises(CheckpointError, match="not registered"):
            _structure.build(node, [1])


def test_registering_the_same_name_twice_is_refused() -> None:
    class Pair2(NamedTuple):
        left: Any

    with pytest.raises(CheckpointError, match="is the name of"):
        checkpoint.register(Pair2, "tests.Pair")
    with pytest.raises(CheckpointError, match="NamedTuple type"):
        checkpoint.register(dict)


def test_a_state_of_every_policy_and_schedule_comes_back_without_an_example(tmp_path: Any) -> None:
    rules = [
        ef.policies.grow(),
        ef.policies.plateau(),
        ef.policies.periodic(every=10),
        ef.policies.random(every=10),
        ef.policies.never(),
        ef.policies.scripted([]),
        ef.policies.budget(100),
        ef.policies.recycle(),
        ef.policies.cooldown(5),
        ef.policies.max_concurrent(2),
        ef.policies.max_total(3),
        ef.policies.stop_after(100),
    ]
    others = {"chain", "check", "no_requests", "refuse", "request", "rule", "seed_blueprints"}
    assert len(rules) == len({name for name in ef.policies.__all__ if name.islower()} - others)
    growth = ef.Growth(
        sites=[ef.site("h", features=4)],
        blueprints={"bottleneck": ef.blueprints.bottleneck(2)},
        capacity=1,
        policy=ef.policies.chain(*rules),
        graft=[
            make()
            for name in ef.grafting.__all__
            if callable(make := getattr(ef.grafting, name)) and name.islower() and name != "check"
        ],
    )
    state = growth.init(jax.random.key(0))
    checkpoint.save(tmp_path, 1, state)
    assert_same(state, checkpoint.restore(tmp_path).value)


def test_every_state_optax_offers_by_name_is_known() -> None:
    names = [name for name in vars(optax) if name.endswith("State") and name[0].isupper()]
    kinds = [vars(optax)[n] for n in names if _records.is_named_tuple(vars(optax)[n])]
    assert len(kinds) > 20
    assert all(_records.name_of(kind) for kind in kinds)


def test_a_field_added_since_takes_its_default_and_one_removed_is_an_error() -> None:
    node = {"kind": "named", "name": "tests.Pair", "keys": ["left"], "children": [0]}
    assert _structure.build(node, [5]) == Pair(left=5, right=None)
    gone = {"kind": "named", "name": "tests.Pair", "keys": ["left", "middle"], "children": [0, 1]}
    with pytest.raises(CheckpointError, match="restore with the version that wrote it"):
        _structure.build(gone, [5, 6])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({1j: np.ones(1)}, "the dictionary key 1j is a builtins.complex"),
        ({"a": {"b": object()}}, "a/b: a builtins.object is neither"),
        ({"a": np.asarray(["x"], object)}, "a: arrays of dtype object"),
        ({"a": np.asarray(["2020-01-01"], "datetime64[D]")}, "cannot be stored"),
        ([b"bytes"], "0: a builtins.bytes"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(tree: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _structure.describe(tree)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}', '{"a": NaN}', "[Infinity]", "[1e999]", "[" * 100_000,
        "[" * 300 + "]" * 300, '"' + "a" * 3000 + '"', "\xff", "", "{", '{"a":}',
    ],
)  # fmt: skip
def test_json_with_two_meanings_or_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- any reason will do
        _json.loads(text.encode("latin-1"), max_bytes=200_000 if text[:2] == "[[" else 2000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["kind", "children", "keys", "name", "path", "dtype", "shape", "x"]),
            inner | st.sampled_from(["dict", "named", "none", "opaque", "list", "tests.Pair"]),
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_no_structure_from_a_file_does_more_than_fail(content: Any) -> None:
    with contextlib.suppress(CheckpointError):
        _structure.build(content, [np.ones(1), np.ones(2)])


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_no_leaf_from_a_file_does_more_than_fail(content: Any) -> None:
    try:
        leaf = _leaf.leaf_from_json(content)
    except CorruptCheckpointError:
        return
    assert leaf.num_bytes >= 0


TREES = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.text(max_size=3) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=10,
)


@given(TREES)
@settings(max_examples=200, deadline=None)
def test_any_tree_comes_back(tree: Any) -> None:
    assert_same(tree, through_json(tree))


def test_weak_and_strong_types_do_not_leak_into_dtypes() -> None:
    tree = {"weak": jnp.asarray(1.0), "strong": jnp.float32(1.0)}
    assert_same(tree, through_json(tree))
