"""Every registered blueprint at every topology it claims."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import QUICK, place, same_bits, standard

import esper_fn as ef
from esper_fn.base import TOPOLOGIES, Blueprint, BodySpec, Cost
from esper_fn.errors import UnknownNameError
from esper_fn.lifecycle import Stage

SHAPES = {"vector": (6,), "sequence": (3, 5), "image": (3, 4, 4)}
CASES = [
    (name, topology)
    for name in ef.blueprints.names()
    for topology in ef.blueprints.get(name).topologies
]
FEATURES = 7  # three chunks of 3, 2 and 2: the narrow ones are padded


def _lattice(name: str, topology: Any, features: int = FEATURES, chunks: int = 3) -> ef.Lattice:
    sites = [ef.site("here", features=features, chunks=chunks, topology=topology)]
    blueprint = ef.blueprints.get(name)
    if blueprint.can_span:
        wide = ef.span(
            "across", source_features=features, features=5, chunks=chunks, topology=topology
        )
        sites.append(wide)
    return ef.lattice(sites=sites, blueprints={name: blueprint}, capacity=chunks)


def _loss(params: Any, seeds: Any, batch: Any, *, has_span: bool) -> jax.Array:
    x, target = batch
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
    h = seeds.grow("here", x @ params["in"])
    out = jnp.tanh(h) @ params["out"]
    if has_span:
        out = seeds.grow("across", out, source=h)
    return jnp.mean(jnp.square(out.astype(jnp.float32) - target))


@cache
def _trained(name: str, topology: Any, dtype: str) -> dict[str, Any]:
    """A small host trained with its bodies, each stage set by hand: losses and states."""
    lattice = _lattice(name, topology)
    growth = ef.growth(
        lattice, levels=1, policy=ef.policies.never(), governor=ef.governors.lenient()
    )
    optimizer = ef.optim.per_body(standard(optax.sgd(0.0)), standard(optax.adam(0.03)))
    loss_fn = partial(_loss, has_span=len(lattice.sites) > 1)

    def step(params: Any, state: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads, readings = growth.value_and_grad(loss_fn)(params, state, batch)
        updates, opt_state = optimizer.update(
            grads, opt_state, (params, state.bodies), slots=growth.slots(state)
        )
        params, bodies = optax.apply_updates((params, state.bodies), updates)
        kept, _, errors = growth._settle(state, bodies)
        return state._replace(bodies=kept), opt_state, (loss, readings, errors)

    @partial(jax.jit, compiler_options=QUICK)
    def run(params: Any, state: Any, opt_state: Any, batch: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            state, opt_state, out = step(params, *carry, batch)
            return (state, opt_state), out

        return jax.lax.scan(body, (state, opt_state), None, length=40)

    rng = np.random.default_rng(0)
    shape = SHAPES[topology]
    params = {
        "in": jnp.asarray(rng.standard_normal((4, FEATURES)) * 0.5, jnp.float32),
        "out": jnp.asarray(rng.standard_normal((FEATURES, 5)) * 0.4, jnp.float32),
    }
    x = jnp.asarray(rng.standard_normal((*shape, 4)), dtype)
    batch = (x, jnp.asarray(rng.standard_normal((*shape, 5)), jnp.float32))

    @partial(jax.jit, compiler_options=QUICK)
    def fresh(key: Any) -> Any:
        return growth.init(key)

    state = place(growth, fresh(jax.random.key(3)), {}, noise=0.0)
    bare = loss_fn(params, ef.BareSeeds(), batch)
    runs: dict[str, Any] = {"bare": bare, "growth": growth, "newborn": state}
    for stage, alpha in (
        (Stage.TRAINING, 0.0),
        (Stage.GRAFTING, 1.0),
        (Stage.FINE_TUNING, 1.0),
        (Stage.FOSSILIZED, 1.0),
    ):
        rows = {seed: (name, stage, alpha) for seed in range(lattice.num_seeds)}
        begun = place(growth, state._replace(owner=jnp.full_like(state.owner, -1)), rows, noise=0.0)
        opt_state = optimizer.init((params, begun.bodies))
        (state, _), (losses, readings, errors) = run(params, begun, opt_state, batch)
        runs[stage.name] = (begun, state, np.asarray(losses), readings)
        assert not np.any(errors)
    return runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "topology"), CASES)
def test_born_as_the_identity_then_learning(name: str, topology: str, dtype: str) -> None:
    runs = _trained(name, topology, dtype)
    training, grafting = runs["TRAINING"], runs["GRAFTING"]
    # Behind the host: the loss stays what it is, to the bit, while parameters move.
    assert same_bits(training[2], np.full_like(training[2], training[2][0]))
    np.testing.assert_allclose(training[2][0], runs["bare"], rtol=1e-2 if dtype != "float32" else 1e-6)
    readings = training[3]
    assert not np.any(readings.output_square[0])  # newborn: r = 0
    if name == "noop":
        assert not jax.tree.leaves(training[1].bodies["here"])
        assert same_bits(grafting[2], training[2])
        return
    for leaf, newborn in zip(
        jax.tree.leaves(training[1].bodies), jax.tree.leaves(runs["newborn"].bodies), strict=True
    ):
        assert np.all(np.any(np.asarray(leaf) != np.asarray(newborn), axis=range(1, leaf.ndim)))
    assert np.all(np.asarray(readings.utility[-1]) > 0)
    assert not np.any(readings.num_errors)
    # With the host: the loss falls, while grafted in and while fine-tuned.
    assert grafting[2][0] < training[2][0]
    assert runs["FINE_TUNING"][2][-1] < grafting[2][-1] * 1.02 < grafting[2][0]
    # Kept for good: nothing moves any more.
    begun, ended, losses, _ = runs["FOSSILIZED"]
    assert same_bits(begun.bodies, ended.bodies)
    assert same_bits(losses, np.full_like(losses, losses[0]))


def _apply(blueprint: Blueprint, params: Any, x: jax.Array, spec: BodySpec) -> jax.Array:
    mask = jnp.ones((spec.inputs,), bool)
    return jax.jit(lambda p, x: blueprint.apply(p, x, spec, mask), compiler_options=QUICK)(params, x)


def _noisy(blueprint: Blueprint, spec: BodySpec) -> Any:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: blueprint.init(key, spec, jnp.float32), jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes
    )


@pytest.mark.parametrize("name", [name for name, topology in CASES if topology == "sequence"])
def test_no_body_leaks_the_future(name: str) -> None:
    blueprint = ef.blueprints.get(name)
    spec = BodySpec(6, 6, "sequence")
    params, length, at = _noisy(blueprint, spec), 8, 5
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 6)), jnp.float32)
    before = _apply(blueprint, params, x, spec)
    after = _apply(blueprint, params, x.at[:, at].add(1.0), spec)
    assert same_bits(before[:, :at], after[:, :at])
    if name != "noop":
        assert np.all(np.any(np.asarray(before[:, at] != after[:, at]), axis=-1))


def test_attention_sees_the_future_only_when_asked_to() -> None:
    blueprint = ef.blueprints.self_attention(4, is_causal=False)
    spec = BodySpec(6, 6, "sequence")
    params = _noisy(blueprint, spec)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 6)), jnp.float32)
    other = _apply(blueprint, params, x.at[:, 5].add(1.0), spec)
    assert np.any(np.asarray(other[:, :5] != _apply(blueprint, params, x, spec)[:, :5]))


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_padding_has_no_influence(name: str, topology: Any) -> None:
    """A narrow chunk's body gives what the same parameters give without their padded part."""
    blueprint, (inner, width) = ef.blueprints.get(name), (3, 4)
    spec = BodySpec(width, width, topology)
    params = _noisy(blueprint, spec)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((*SHAPES[topology], width)), jnp.float32)
    mask = jnp.arange(width) < inner
    x = x.at[..., inner:].set(0.0)
    r = jax.jit(lambda p: blueprint.apply(p, x, spec, mask), compiler_options=QUICK)(params)

    small = BodySpec(inner, inner, topology)
    shapes = jax.eval_shape(lambda key: blueprint.init(key, small, jnp.float32), jax.random.key(0))
    cut = jax.tree.map(lambda leaf, s: leaf[tuple(slice(n) for n in s.shape)], params, shapes)
    want = _apply(blueprint, cut, x[..., :inner], small)
    np.testing.assert_allclose(r[..., :inner], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ef.blueprints.names())
def test_check_accepts_every_registered_blueprint(name: str) -> None:
    ef.blueprints.check(ef.blueprints.get(name))


def _planted(**changes: Any) -> Blueprint:
    good = ef.blueprints.low_rank(2)
    return good._replace(**{"name": "planted", "topologies": ("vector",), **changes})


def _init_with(value: str) -> Any:
    def init(key: Any, spec: BodySpec, dtype: Any) -> Any:
        down, up = jax.random.split(key)
        dtype = jnp.float32 if value == "float32" else dtype
        made = {
            "down": jax.random.normal(down, (spec.inputs, 2), dtype),
            "up": jnp.zeros((2, spec.outputs), dtype),
        }
        if value == "no identity":
            made["up"] = jax.random.normal(up, (2, spec.outputs), dtype)
        if value == "all zero":
            made["down"] = jnp.zeros_like(made["down"])
        return made

    return init


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": _init_with("no identity")}, "output at birth must be exactly zero"),
        ({"init": _init_with("all zero")}, "no parameter gets a gradient at birth"),
        ({"init": _init_with("float32")}, r"init must make bfloat16 parameters, got \['float32'\]"),
        ({"cost": lambda spec, positions: Cost(1, 1)}, "cost states 1 parameters, init makes 24"),
        (
            {"apply": lambda p, x, spec, mask: (x @ p["down"].astype(x.dtype)) * 0},
            r"apply must return \(3, 6\) float32, got \(3, 2\) float32",
        ),
        (
            {"apply": lambda p, x, s, m: ef.blueprints.low_rank(2).apply(p, x.astype("float32"), s, m)},
            r"apply must return \(3, 6\) bfloat16, got \(3, 6\) float32",
        ),
        ({"topologies": ()}, r"topologies must be some of .*, got \(\)"),
        ({"topologies": ("graph",)}, r"topologies must be some of .*, got \('graph',\)"),
    ],
)
def test_check_names_what_is_wrong(changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"'planted'.*{words}"):
        ef.blueprints.check(_planted(**changes))


def test_names_and_factories() -> None:
    assert set(TOPOLOGIES) == {topology for _, topology in CASES}
    assert ef.blueprints.get("low_rank", rank=5).cost(BodySpec(8, 8, "vector"), 1).parameters == 80
    with pytest.raises(UnknownNameError, match="unknown blueprint 'moe'; allowed: bottleneck, .*reg"):
        ef.blueprints.get("moe")
    with pytest.raises(ValueError, match="'noop' is registered already; choose another name"):
        ef.blueprints.register("noop", ef.blueprints.low_rank)
    ef.blueprints.register("noop", ef.blueprints.noop)  # the same again is no error
    for name in ("low_rank", "bottleneck", "gated", "normalised", "squeeze_excite"):
        size = "rank" if name == "low_rank" else "width"
        with pytest.raises(ValueError, match=f"{size} must be a positive int, got 0"):
            ef.blueprints.get(name, **{size: 0})
    with pytest.raises(ValueError, match="window must be a positive int, got True"):
        ef.blueprints.depthwise_conv(window=True)
    with pytest.raises(ValueError, match=r"activation must be one of \['gelu', .*, got 'tanh'"):
        ef.blueprints.bottleneck(activation="tanh")  # type: ignore[arg-type]


def test_costs_count_operations_by_position() -> None:
    one, many = (
        ef.blueprints.bottleneck(4).cost(BodySpec(8, 6, "sequence"), positions)
        for positions in (1, 5)
    )
    assert one.parameters == many.parameters == 4 * 8 + 4 + 4 * 6
    assert many.flops == 5 * one.flops
    assert one.flops == 2 * (4 * 8 + 4 * 6) + 2 * 4  # two products, a bias and a ReLU
