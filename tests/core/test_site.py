"""Places, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.errors import LayoutError, UnknownNameError
from esper_fn.types import Layout, Seeds, Site

LOW_RANK = {"low_rank": ef.blueprints.low_rank(2)}
CONV = {"conv": ef.blueprints.depthwise_conv()}


def _layout(*sites: Site, **changes: Any) -> Layout:
    options: dict[str, Any] = {"sites": sites, "blueprints": LOW_RANK, "capacity": 2, **changes}
    return make_layout(**options)


@pytest.mark.parametrize("features", range(1, 13))
def test_chunks_are_those_of_array_split(features: int) -> None:
    for chunks in range(1, features + 1):
        split = np.array_split(np.arange(features), chunks)
        chunking = ef.site("s", features=features, chunks=chunks).target
        assert chunking.sizes.tolist() == [len(part) for part in split]
        assert chunking.starts.tolist() == [part[0] for part in split]
        assert chunking.widest == max(map(len, split))
        assert chunking.is_even == (len(set(map(len, split))) == 1)
        assert chunking.mask.sum(1).tolist() == chunking.sizes.tolist()
        for row, size in zip(chunking.mask, chunking.sizes, strict=True):
            assert row[:size].all()


@pytest.mark.parametrize("chunks", [5, 100])
def test_more_chunks_than_features_are_refused(chunks: int) -> None:
    with pytest.raises(LayoutError, match=f"{chunks} chunks do not fit 4 features; .* at most 4"):
        ef.site("s", features=4, chunks=chunks)
    with pytest.raises(LayoutError, match=f"{chunks} chunks do not fit 4 features"):
        ef.site("s", source_features=4, features=200, chunks=chunks)
    with pytest.raises(LayoutError, match=f"{chunks} chunks do not fit 4 features"):
        ef.site("s", source_features=200, features=4, chunks=chunks)


@pytest.mark.parametrize("field", ["features", "chunks", "layers", "positions"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_sizes_are_positive_ints(field: str, value: Any) -> None:
    with pytest.raises(LayoutError, match=f"site 's': {field} must be a positive int, got"):
        ef.site("s", **{"features": 8, field: value})


def test_other_fields_of_a_site() -> None:
    with pytest.raises(LayoutError, match="source_features must be a positive int, got 0"):
        ef.site("s", source_features=0, features=4)
    with pytest.raises(LayoutError, match="non-empty name, got ''"):
        ef.site("", features=4)
    with pytest.raises(LayoutError, match=r"topology must be one of \('vector', .*got 'graph'"):
        ef.site("s", features=4, topology="graph")  # type: ignore[arg-type]


def test_a_layout_says_what_does_not_fit() -> None:
    site = ef.site("s", features=4)
    with pytest.raises(LayoutError, match=r"at least one site; make one with `site`"):
        _layout()
    with pytest.raises(LayoutError, match=r"names must differ, given twice: \['s'\]"):
        _layout(site, ef.site("s", features=8))
    with pytest.raises(LayoutError, match="at least one blueprint"):
        _layout(site, blueprints={})
    with pytest.raises(LayoutError, match="at most 127 blueprints, got 128"):
        _layout(site, blueprints={str(i): LOW_RANK["low_rank"] for i in range(128)})
    with pytest.raises(LayoutError, match=r"'conv' serves .*sequence.*without spans.*'s', 'vector"):
        _layout(site, blueprints={**LOW_RANK, **CONV})
    image = ef.site("i", features=4, topology="image")
    with pytest.raises(LayoutError, match=r"no blueprint serves site 's' \(vector\).*\['conv'\]"):
        _layout(image, site, blueprints=CONV)
    wide = ef.site("w", source_features=4, features=8, topology="image")
    with pytest.raises(LayoutError, match=r"no blueprint serves site 'w' \(image, a span\)"):
        _layout(image, wide, blueprints=CONV)
    for capacity in (0, -1, 2.0, True):
        with pytest.raises(LayoutError, match=f"capacity must be a positive int, got {capacity}"):
            _layout(site, capacity=capacity)
    with pytest.raises(LayoutError, match="dtype must be a floating type, got"):
        _layout(site, dtype=jnp.int32)


def test_seeds_are_numbered_site_by_site_layer_by_layer_chunk_by_chunk() -> None:
    layout = _layout(
        ef.site("a", features=6, chunks=2),
        ef.site("b", features=6, chunks=3, layers=2),
        ef.site("c", source_features=4, features=2),
    )
    assert layout.num_seeds == 2 + 6 + 1
    names = [layout.locate(seed) for seed in range(layout.num_seeds)]
    assert [(site.name, layer, chunk) for site, layer, chunk in names] == [
        *[("a", 0, c) for c in range(2)],
        *[("b", layer, c) for layer in range(2) for c in range(3)],
        ("c", 0, 0),
    ]
    for seed, (site, layer, chunk) in enumerate(names):
        assert layout.seed_index(site.name, chunk, layer) == seed
    assert layout.per_seed(np.asarray([7, 8, 9, 10])).tolist() == [7, 7, 8, 8, 8, 9, 9, 9, 10]
    # A pool never has more slots than its layer has seeds: 2 + 2 layers of 2 + 1.
    assert layout.num_slots == 2 + 4 + 1
    assert layout.cost("b", "low_rank") == (2 * (2 + 2), 2 * 2 * (2 + 2))
    with pytest.raises(
        LayoutError, match=r"chunks 0\.\.2 and layers 0\.\.1, got chunk 3 of layer 0"
    ):
        layout.seed_index("b", 3)
    with pytest.raises(LayoutError, match=r"seed must be in 0\.\.8, got 9"):
        layout.locate(9)
    with pytest.raises(UnknownNameError, match="unknown site 'd'; allowed: a, b, c"):
        layout.seed_index("d", 0)
    with pytest.raises(UnknownNameError, match="unknown blueprint 'x'; allowed: low_rank"):
        layout.cost("a", "x")


SITES = (
    ef.site("plain", features=6, chunks=2),
    ef.site("wide", source_features=4, features=6),
    ef.site("deep", features=6, layers=2),
    ef.site("text", features=6, topology="sequence"),
)


def _grow(*calls: Any) -> Any:
    """Shapes of what a loss of these calls would return."""
    growth = ef.Growth(**_layout(*SITES).arguments)
    state = growth.init(jax.random.key(0))

    def loss(params: Any, seeds: Seeds) -> Any:
        del params
        return [call(seeds) for call in calls]

    return jax.eval_shape(lambda s: loss(None, growth.seeds(s)), state)


X = jnp.ones((3, 6))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda s: s.grow("nowhere", X),
            "unknown site 'nowhere'; allowed: deep, plain, text, wide",
        ),
        (
            lambda s: s.grow("plain", X[:, :5]),
            "'plain': x has 5 features, declared are 6; the last",
        ),
        (
            lambda s: s.grow("plain", X.astype(jnp.int32)),
            "must be float32, bfloat16 or .*got int32",
        ),
        (lambda s: s.grow("plain", [1.0] * 6), "'plain': x must be an array, got <class 'list'>"),
        (lambda s: s.grow("plain", jnp.ones(())), r"needs at least 1 axes, got shape \(\)"),
        (lambda s: s.grow("text", X[0]), r"'text' \(sequence\): x needs at least 2 axes, got"),
        (lambda s: s.grow("plain", X, source=X), "'plain' is no span: do not pass source="),
        (lambda s: s.grow("wide", X), "'wide' is a span: pass source="),
        (lambda s: s.grow("wide", X, source=X), "source has 6 features, declared are 4"),
        (lambda s: s.grow("wide", X, source=X[:2, :4]), r"source \(2, 4\) .*last axis only"),
        (
            lambda s: s.grow("wide", X, source=X[:, :4].astype(jnp.bfloat16)),
            "source .* bfloat16 and x .* float32 may differ in their last axis only",
        ),
        (lambda s: s.grow("deep", X), "has 2 layers: scan over `seeds.layers.'deep'.`"),
        (lambda s: s.layers("plain"), "'plain' has no layers; declare it with `layers=`"),
        (lambda s: s.layer("plain", 0), "'plain' has no layers"),
        (
            lambda s: s.layer("deep", 2),
            r"'deep' has layers 0\.\.1, got 2; declare more with `layers=`",
        ),
        (lambda s: s.layer("deep", -1), r"'deep' has layers 0\.\.1, got -1"),
        (lambda s: s.layers("nowhere"), "unknown site 'nowhere'.*give it to `Growth"),
        (lambda s: s.layer("deep", 0).grow("plain", X), "unknown site 'plain'; allowed: deep"),
    ],
)
def test_misuse_in_the_loss_function_is_named(call: Any, words: str) -> None:
    with pytest.raises((LayoutError, UnknownNameError), match=words):
        _grow(call)


def test_right_use_keeps_shape_and_dtype() -> None:
    shapes = _grow(
        lambda s: s.grow("plain", X.astype(jnp.bfloat16)),
        lambda s: s.grow("plain", X[0].astype(jnp.float16)),
        lambda s: s.grow("wide", X, source=X[:, :4]),
        lambda s: s.layer("deep", 1).grow("deep", X),
        lambda s: s.grow("text", X),
    )
    assert [(leaf.shape, leaf.dtype.name) for leaf in shapes] == [
        ((3, 6), "bfloat16"),
        ((6,), "float16"),
        ((3, 6), "float32"),
        ((3, 6), "float32"),
        ((3, 6), "float32"),
    ]


def test_a_site_that_the_loss_never_reaches_is_named() -> None:
    growth = ef.Growth(**_layout(ef.site("near", features=6), ef.site("far", features=6)).arguments)
    state = growth.init(jax.random.key(0))

    def loss(params: Any, seeds: Seeds) -> Any:
        return jnp.sum(seeds.grow("near", params))

    with pytest.raises(LayoutError, match=r"never reaches site\(s\) \['far'\] .*; call .*'far'"):
        jax.eval_shape(growth.value_and_grad(loss), X, state)


def test_the_bare_host_takes_the_same_calls() -> None:
    bare = ef.NoSeeds()
    assert jax.tree.leaves(bare) == []
    for seeds in (bare, bare.layers("deep"), bare.layer("deep", 1)):
        assert seeds.grow("anything", X) is X
        assert seeds.grow("anything", X, source=X[:, :4]) is X
