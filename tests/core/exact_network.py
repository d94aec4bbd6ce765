"""A small network for the tests of the exact view, and its definition in NumPy with float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain
from jax.flatten_util import ravel_pytree
from support import QUICK, adapter_of, blank, place

import esper_fn as ef
from esper_fn.lifecycle import ACTS, Stage

SITES = [
    ef.site("hidden", features=7, chunks=3),
    ef.site("over", source_features=7, features=5, chunks=2),
    ef.site("deep", features=5, chunks=2, layers=2),
]
BLUEPRINTS = {
    "gelu": ef.blueprints.bottleneck(3, activation="gelu"),
    "silu": ef.blueprints.bottleneck(2, activation="silu"),
}
# Seeds 0 to 2 are those of `hidden`, 3 and 4 of `over`, 5 to 8 of the two layers of `deep`.
ROWS = {
    0: ("gelu", Stage.TRAINING, 0.0),
    1: ("silu", Stage.GRAFTING, 0.4),
    2: ("gelu", Stage.FOSSILIZED, 1.0),
    4: ("gelu", Stage.FINE_TUNING, 0.7),
    5: ("silu", Stage.EVALUATING, 0.5),
    8: ("gelu", Stage.STABILIZATION, 0.8),
}
FULL = {seed: (name, stage, 1.0) for seed, (name, stage, _) in ROWS.items() if seed}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)


PARAMS = {"in": normal(2, 7), "out": normal(7, 5)}
X = normal(3, 2, seed=1)


@cache
def make_growth(at_once: int | None = 1, freeze: tuple[Stage, ...] = ()) -> ef.Growth:
    return ef.Growth(
        sites=SITES,
        blueprints=BLUEPRINTS,
        capacity=3,
        adapters_at_once=at_once,
        policy=ef.policies.never(),
        settings=ef.lifecycle.settings(freeze=freeze),
    )


def make_state(growth: ef.Growth, rows: Any = None) -> ef.GrowthState:
    return place(growth, blank(growth), ROWS if rows is None else rows)


def model(params: Any, seeds: Any, x: jax.Array, wrap: Any = lambda function: function) -> Any:
    h = wrap(lambda h, seeds: seeds.grow("hidden", h))(jnp.tanh(x @ params["in"]), seeds)
    y = seeds.grow("over", h @ params["out"], source=h)

    def layer(y: jax.Array, own: Any) -> Any:
        return own.grow("deep", jnp.tanh(y)), None

    return jax.lax.scan(wrap(layer), y, seeds.layers("deep"))[0]


def loss_fn(params: Any, seeds: Any, x: jax.Array, **options: Any) -> jax.Array:
    return jnp.sum(jnp.square(model(params, seeds, x, **options) - 0.5))


class Point(NamedTuple):
    """What a derivative is taken of."""

    params: Any
    adapters: Any
    x: jax.Array


def make_loss(
    growth: ef.Growth, state: ef.GrowthState, *, exact: bool = True, **options: Any
) -> Callable[[Point], jax.Array]:
    """The loss as a function of a `Point`."""

    def loss(point: Point) -> jax.Array:
        seeds = growth.seeds(state._replace(adapters=point.adapters), exact=exact)
        return loss_fn(point.params, seeds, point.x, **options)

    return loss


def jit(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)


def close(got: Any, want: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# --- the definition ------------------------------------------------------------------------------


def definition(growth: ef.Growth, state: ef.GrowthState, point: Point) -> float:
    """`loss_fn` in float64."""

    def grow(seed: int, site: Any, x: np.ndarray, source: np.ndarray) -> np.ndarray:
        parts = []
        for chunk in range(site.chunks):
            own, read = (
                values[..., split.starts[chunk] : split.starts[chunk] + split.sizes[chunk]]
                for values, split in ((x, site.target), (source, site.source))
            )
            if seed + chunk in ROWS:
                name, stage, alpha = ROWS[seed + chunk]
                raw = adapter_of(growth, state, seed + chunk, point.adapters)
                adapter = plain.cut(raw, read.shape[-1], own.shape[-1])
                own = own + (alpha if ACTS[stage] else 0) * plain.DENSE[name](adapter, read)
            parts.append(own)
        return np.concatenate(parts, axis=-1)

    hidden, over, deep = SITES
    h = np.tanh(point.x @ point.params["in"])
    h = grow(0, hidden, h, h)
    y = grow(3, over, h @ point.params["out"], h)
    for seed in (5, 7):
        y = np.tanh(y)
        y = grow(seed, deep, y, y)
    return float(np.sum((y - 0.5) ** 2))


@cache
def setting() -> Any:
    """A growth, its state, the loss and a point, and directions of unit length from it."""
    growth = make_growth()
    state = make_state(growth)
    point = Point(PARAMS, state.adapters, X)
    size = ravel_pytree(point)[0].size
    rng = np.random.default_rng(5)
    along = rng.standard_normal((6, size))
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    return growth, state, make_loss(growth, state), point, along


def along_line(direction: np.ndarray, at: float) -> float:
    """The definition at the point moved along a direction."""
    growth, state, _, point, _ = setting()
    leaves, structure = jax.tree.flatten(point)
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]
    moved = [
        np.asarray(leaf, np.float64) + at * part.reshape(leaf.shape)
        for leaf, part in zip(leaves, np.split(direction, sizes), strict=True)
    ]
    return definition(growth, state, jax.tree.unflatten(structure, moved))


def flat(function: Any, point: Any) -> Any:
    """A function of the point's numbers in one row, and these."""
    row, restore = ravel_pytree(point)
    return lambda row: function(restore(row)), row
