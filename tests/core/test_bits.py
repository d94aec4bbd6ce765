"""Promise 1: within one compiled program the host's bits do not depend on seeds that do not act."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import blank, place, same_bits

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.lifecycle import Stage
from esper_fn.types import Layout


class Host(NamedTuple):
    """A model with sites where compilers like to fuse: scalings before, residual sums after."""

    layout: Layout
    loss: Any
    params: Any
    batch: Any


def _normal(*shape: int, scale: float = 1.0, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def _scale(h: jax.Array, by: jax.Array) -> jax.Array:
    return h * by.reshape(*(1,) * (h.ndim - 1), -1)


def _norm(h: jax.Array, scale: jax.Array) -> jax.Array:
    wide = h.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return _scale((centred * jax.lax.rsqrt(variance + 1e-5)).astype(h.dtype), scale)


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), label, axis=-1)
    return -jnp.mean(chosen)


@cache
def mlp(dtype: str = "float32") -> Host:
    """Layer norms, scalings and sums around every site; uneven chunks; a span."""
    width = 50
    layout = make_layout(
        sites=[
            ef.site("first", features=width, chunks=6),
            ef.site("second", features=width, chunks=5),
            ef.site("over", source_features=width, features=width, chunks=6),
        ],
        blueprints={"low_rank": ef.blueprints.low_rank(3)},
        capacity=6,
    )

    def loss(params: Any, seeds: Any, batch: Any) -> jax.Array:
        h = batch[0] @ params["in"]
        for name, layer in zip(("first", "second"), params["layers"], strict=True):
            below = h
            h = _norm(h, layer["norm"]) @ layer["weights"]
            h = _scale(jax.nn.gelu(h), layer["norm"])
            h = _scale(seeds.grow(name, h), layer["norm"]) + below
        h = seeds.grow("over", _scale(h, layer["norm"]), source=below) + below
        return _cross_entropy(h @ params["out"], batch[1])

    layers = [
        {
            "norm": 1 + _normal(width, scale=0.1, seed=i),
            "weights": _normal(width, width, scale=0.15),
        }
        for i in range(2)
    ]
    params = {
        "in": _normal(20, width, scale=0.2),
        "layers": layers,
        "out": _normal(width, 7, scale=0.2),
    }
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, _normal(33, 20)))
    return Host(layout, loss, params, (x, jnp.arange(33)[:, None] % 7))


@cache
def conv() -> Host:
    """Two convolutions with batch statistics between, and a sum over the second site."""
    width = 22
    layout = make_layout(
        sites=[
            ef.site(name, features=width, chunks=5, topology="image", positions=36)
            for name in ("first", "second")
        ],
        blueprints={
            "depthwise": ef.blueprints.depthwise_conv(),
            "squeeze": ef.blueprints.squeeze_excite(2),
        },
        capacity=5,
    )

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    def loss(params: Any, seeds: Any, batch: Any) -> jax.Array:
        h = jax.nn.relu(_scale(convolve(batch[0], params["first"]), params["scale"]))
        h = seeds.grow("first", h)
        g = convolve(h, params["second"])
        mean, spread = (f(g, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        g = seeds.grow("second", _scale((g - mean) * jax.lax.rsqrt(spread + 1e-5), params["scale"]))
        pooled = jnp.mean(jax.nn.relu(_scale(g, params["scale"]) + h), axis=(1, 2))
        return _cross_entropy(pooled @ params["out"], batch[1])

    params = {
        "first": _normal(3, 3, 3, width, scale=0.2),
        "second": _normal(3, 3, width, width, scale=0.07),
        "scale": 1 + _normal(width, scale=0.1),
        "out": _normal(width, 5, scale=0.3),
    }
    return Host(layout, loss, params, (_normal(4, 6, 6, 3), jnp.arange(4)[:, None] % 5))


@cache
def transformer() -> Host:
    """Two blocks under a scan, each with seeds of its own, a residual sum right after each site."""
    width, length, layers, heads = 24, 8, 2, 3
    layout = make_layout(
        sites=[
            ef.site(
                name, features=width, chunks=4, topology="sequence", layers=layers, positions=length
            )
            for name in ("attention", "mlp")
        ],
        blueprints={
            "gated": ef.blueprints.gated(3),
            "attention": ef.blueprints.self_attention(4),
        },
        capacity=4,
    )

    def attend(x: jax.Array, block: Any) -> jax.Array:
        qkv = (x @ block["qkv"]).reshape(*x.shape[:-1], 3, heads, -1)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        seen = jnp.tril(jnp.ones((1, 1, length, length), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ block["out"]

    def step(h: jax.Array, stacked_layers: Any) -> Any:
        block, attention, mlp = stacked_layers
        h = h + attention.grow("attention", attend(_norm(h, block["norm"]), block))
        inner = jax.nn.gelu(_norm(h, block["norm"]) @ block["up"]) @ block["down"]
        return h + mlp.grow("mlp", inner), None

    def loss(params: Any, seeds: Any, batch: Any) -> jax.Array:
        h = params["tokens"][batch[0]]
        stacked_layers = (params["blocks"], seeds.layers("attention"), seeds.layers("mlp"))
        h, _ = jax.lax.scan(step, h, stacked_layers)
        return _cross_entropy(h @ params["out"], batch[1])

    params = {
        "tokens": _normal(11, width),
        "blocks": {
            "norm": 1 + _normal(layers, width, scale=0.1),
            "qkv": _normal(layers, width, 3 * width, scale=0.2),
            "out": _normal(layers, width, width, scale=0.2),
            "up": _normal(layers, width, 2 * width, scale=0.2),
            "down": _normal(layers, 2 * width, width, scale=0.15),
        },
        "out": _normal(width, 11, scale=0.2),
    }
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, length + 1)))
    return Host(layout, loss, params, (tokens[:, :-1], tokens[:, 1:, None]))


HOSTS: dict[str, Any] = {
    "mlp": mlp,
    "mlp in bfloat16": lambda: mlp("bfloat16"),
    "conv": conv,
    "transformer": transformer,
}


@cache
def compiled(name: str, at_once: int | None) -> Any:
    host = HOSTS[name]()
    growth = ef.Growth(**host.layout.arguments, adapters_at_once=at_once)
    run = jax.jit(growth.value_and_grad(host.loss))
    return host, growth, blank(growth), run


def quiet_states(growth: ef.Growth, state: Any) -> dict[str, Any]:
    """Seeds in every stage that must not show: none, few (another variant) and all alive."""
    layout = growth.layout

    def served(seed: int, turn: int) -> str:
        site = layout.locate(seed)[0]
        names = [
            name
            for name, blueprint in zip(layout.names, layout.blueprints, strict=True)
            if blueprint.can_span or not site.is_span
        ]
        return names[turn % len(names)]

    seeds = range(layout.num_seeds)
    mixed = (Stage.TRAINING, Stage.GERMINATED, Stage.DORMANT, Stage.CULLED, Stage.CANCELLED)
    rows = {
        "dormant": {},
        "one in training": {1: (served(1, 0), Stage.TRAINING, 0.0)},
        "all in training": {s: (served(s, s), Stage.TRAINING, 0.0) for s in seeds},
        "one bank full": {s: (served(s, 0), Stage.TRAINING, 0.0) for s in range(4)},
        "germinated": {s: (served(s, s), Stage.GERMINATED, 0.0) for s in seeds},
        "culled": {s: (served(s, s), Stage.CULLED, 0.0) for s in seeds},
        "mixed": {s: (served(s, s), mixed[s % 5], 0.0) for s in seeds},
    }
    return {name: place(growth, state, row) for name, row in rows.items()}


@pytest.mark.parametrize(
    ("name", "at_once"),
    [
        ("mlp", 1),
        ("mlp", None),
        ("mlp in bfloat16", 1),
        ("conv", 1),
        ("conv", None),
        ("transformer", 1),
    ],
)
def test_the_hosts_bits_do_not_depend_on_quiet_seeds(name: str, at_once: int | None) -> None:
    host, growth, blank_state, run = compiled(name, at_once)
    states = quiet_states(growth, blank_state)
    runs = {label: run(host.params, state, host.batch) for label, state in states.items()}
    value, (d_host, _), _ = runs["dormant"]
    assert np.isfinite(value)
    for label, (other, (d_other, d_adapters), statistics) in runs.items():
        assert same_bits((value, d_host), (other, d_other)), label
        is_learning = "training" in label or label in ("mixed", "one bank full")
        assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(d_adapters)) == is_learning
        assert (float(jnp.sum(statistics.num_live)) > 0) == is_learning


@pytest.mark.parametrize("name", list(HOSTS))
def test_the_bare_host_differs_by_roundings_alone(name: str) -> None:
    host, growth, state, run = compiled(name, 3)
    value, (d_host, _), _ = run(host.params, place(growth, state, {}), host.batch)
    bare = jax.jit(jax.value_and_grad(lambda p, b: host.loss(p, ef.NoSeeds(), b)))
    want, d_want = bare(host.params, host.batch)
    for got, other in zip(
        jax.tree.leaves((value, d_host)), jax.tree.leaves((want, d_want)), strict=True
    ):
        unit = float(jnp.finfo(other.dtype).eps) * np.max(np.abs(np.asarray(other, np.float32)))
        gap = np.asarray(got, np.float32) - np.asarray(other, np.float32)
        assert np.max(np.abs(gap)) <= 4 * unit


def test_the_same_inputs_give_the_same_bits_again() -> None:
    """Promise 3, of the forward and backward pass."""
    host, growth, blank_state, run = compiled("mlp", 3)
    state = quiet_states(growth, blank_state)["mixed"]
    assert same_bits(run(host.params, state, host.batch), run(host.params, state, host.batch))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_population_in_loops_keeps_every_bit_of_16(dtype: str) -> None:
    """In a process of its own, as XLA's quick compilation loses payloads of NaN by itself."""
    program = f"import test_bits; test_bits.keep_every_bit({dtype!r})"
    folder = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=os.environ | {"XLA_FLAGS": ""}, check=True
    )


def keep_every_bit(dtype: str) -> None:
    """Subnormal numbers and the payloads of NaN, which a select by way of float32 would lose."""
    growth = ef.Growth(
        sites=[ef.site("hidden", features=256, chunks=4)],
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=4,
        adapters_at_once=1,
    )
    rows = [{}, {1: ("low_rank", Stage.TRAINING, 0.0)}, {0: ("low_rank", Stage.TRAINING, 0.0)}]
    members = [place(growth, blank(growth), row) for row in rows]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    every = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).reshape(256, 256)

    def grow(state: Any, x: jax.Array, d: jax.Array) -> Any:
        def loss(_: Any, seeds: Any, x: jax.Array) -> Any:
            y, pull = jax.vjp(lambda x: seeds.grow("hidden", x), x)
            return jnp.float32(0), (y, *pull(d))

        (_, results), _, _ = growth.value_and_grad(loss, has_aux=True)((), state, x)
        return results

    y, d_x = jax.jit(jax.vmap(grow, in_axes=(0, None, None)))(stacked, every, every)
    for got in (*y, *d_x):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint16), every.view(np.uint16))


def test_an_acting_seed_does_change_the_loss() -> None:
    """The guard of this file: had adapters no effect at all, every test above would pass."""
    host, growth, blank_state, run = compiled("mlp", 3)
    graft = place(growth, blank_state, {1: ("low_rank", Stage.GRAFTING, 0.5)})
    dormant = run(host.params, place(growth, blank_state, {}), host.batch)
    assert not same_bits(run(host.params, graft, host.batch)[0], dormant[0])
