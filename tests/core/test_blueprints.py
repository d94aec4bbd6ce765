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
from esper_fn.blueprints import TOPOLOGIES, AdapterSpec, Blueprint, Cost
from esper_fn.lifecycle import Stage

SHAPES = {"vector": (6,), "sequence": (3, 5), "image": (3, 4, 4)}
FACTORIES = {
    name: getattr(ef.blueprints, name)
    for name in ef.blueprints.__all__
    if name.islower() and name != "check"
}
CASES = [(name, topology) for name, make in FACTORIES.items() for topology in make().topologies]
STEPS = 40


def _of(topology: str) -> list[str]:
    return [name for name, other in CASES if other == topology]


@cache
def _newborn(topology: Any) -> Any:
    """One site with a chunk for every blueprint of a topology; the later half is padded."""
    names = _of(topology)
    features = 4 * len(names) - len(names) // 2
    growth = ef.Growth(
        sites=[ef.site("here", features=features, chunks=len(names), topology=topology)],
        blueprints={name: FACTORIES[name]() for name in names},
        capacity=1,
        adapters_at_once=None,
    )
    return names, growth, growth.init(jax.random.key(3))


@cache
def _trained(topology: Any, dtype: str) -> dict[str, Any]:
    """All blueprints of a topology, one chunk each, taught to reach a target of their own.

    The chunks do not mix, so each has a loss of its own. Runs by stage: the state before and after,
    the losses `[steps, chunks]`, the statistics. `frozen` is FOSSILIZED where fossils stand still.
    """
    names, growth, state = _newborn(topology)
    site = growth.layout.sites[0]
    # Shadow training has no curvature, so nothing stops it: small steps, or it overshoots.
    optimizer = ef.optim.per_adapter(standard(optax.sgd(0.0)), standard(optax.sign_sgd(0.001)))
    starts = site.target.starts

    def by_chunk(params: Any, seeds: Any, batch: Any) -> jax.Array:
        x, target = batch
        h = seeds.grow("here", x @ params["in"].astype(x.dtype))
        gaps = jnp.square(h.astype(jnp.float32) - target)
        return jnp.add.reduceat(jnp.mean(gaps, axis=range(gaps.ndim - 1)), jnp.asarray(starts))

    def loss_fn(params: Any, seeds: Any, batch: Any) -> Any:
        losses = by_chunk(params, seeds, batch)
        return jnp.sum(losses), losses

    @partial(jax.jit, compiler_options=QUICK)
    def run(params: Any, state: Any, batch: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            state, opt_state = carry
            grads = growth.value_and_grad(loss_fn, has_aux=True)
            (_, losses), gradients, statistics = grads(params, state, batch)
            updates, opt_state = optimizer.update(
                gradients, opt_state, (params, state.adapters), slots=growth.slots(state)
            )
            _, adapters = optax.apply_updates((params, state.adapters), updates)
            return (state._replace(adapters=adapters), opt_state), (losses, statistics)

        opt_state = optimizer.init((params, state.adapters))
        (state, _), out = jax.lax.scan(step, (state, opt_state), None, length=STEPS)
        return state, *out

    rng = np.random.default_rng(0)
    shape = SHAPES[topology]
    params = {"in": jnp.asarray(rng.standard_normal((4, site.features)) * 0.5, jnp.float32)}
    x = jnp.asarray(rng.standard_normal((*shape, 4)), dtype)
    batch = (x, jnp.asarray(rng.standard_normal((*shape, site.features)), jnp.float32))
    runs: dict[str, Any] = {
        "names": names,
        "bare": by_chunk(params, ef.NoSeeds(), batch),
        "newborn": state.adapters["here"],
    }
    frozen = state.settings.is_frozen.at[Stage.FOSSILIZED].set(True)
    for label, stage, alpha in (
        ("TRAINING", Stage.TRAINING, 0.0),
        ("GRAFTING", Stage.GRAFTING, 1.0),
        ("FINE_TUNING", Stage.FINE_TUNING, 1.0),
        ("FOSSILIZED", Stage.FOSSILIZED, 1.0),
        ("frozen", Stage.FOSSILIZED, 1.0),
    ):
        if label == "frozen":
            state = state._replace(settings=state.settings._replace(is_frozen=frozen))
        rows = {chunk: (name, stage, alpha) for chunk, name in enumerate(names)}
        free = state._replace(owner=jnp.full_like(state.owner, -1))
        begun = place(growth, free, rows, noise=0.0)
        state, losses, statistics = run(params, begun, batch)
        runs[label] = (begun, state, np.asarray(losses), statistics)
    return runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "topology"), CASES)
def test_born_as_the_identity_then_learning(name: str, topology: str, dtype: str) -> None:
    runs = _trained(topology, dtype)
    chunk = runs["names"].index(name)
    begun, trained, losses, statistics = runs["TRAINING"]
    # Behind the host: the loss stays what it is, to the bit, while parameters move.
    assert same_bits(losses[:, chunk], np.full((STEPS,), losses[0, chunk]))
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(losses[0, chunk], runs["bare"][chunk], rtol=tolerance)
    assert statistics.output_square[0, chunk] == 0  # newborn: r = 0
    assert not np.any(statistics.num_errors)
    grafted = runs["GRAFTING"][2][:, chunk]
    if name == "noop":
        assert jax.tree.leaves(trained.adapters["here"][name]) == []
        assert same_bits(grafted, losses[:, chunk])
        return
    moved = [
        np.any(np.asarray(new) != np.asarray(old))
        for new, old in zip(
            jax.tree.leaves(trained.adapters["here"][name]),
            jax.tree.leaves(runs["newborn"][name]),
            strict=True,
        )
    ]
    assert all(moved)
    assert statistics.utility[-1, chunk] > 0
    # With the host: the loss is lower, and falls on, while grafted in and while fine-tuned.
    assert grafted[0] < losses[0, chunk]
    assert grafted[-1] < grafted[0]
    assert runs["FINE_TUNING"][2][-1, chunk] < grafted[-1] * 1.01
    # Kept for good: it learns on, or, frozen, nothing moves any more.
    begun, ended, losses, _ = runs["FOSSILIZED"]
    assert not same_bits(begun.adapters["here"][name], ended.adapters["here"][name])
    assert losses[-1, chunk] < runs["FINE_TUNING"][2][-1, chunk] * 1.01
    begun, ended, losses, _ = runs["frozen"]
    assert same_bits(begun.adapters, ended.adapters)
    assert same_bits(losses, np.broadcast_to(losses[:1], losses.shape))


def _apply(blueprint: Blueprint, params: Any, x: jax.Array, spec: AdapterSpec) -> jax.Array:
    mask = jnp.ones((spec.inputs,), bool)
    return jax.jit(lambda p, x: blueprint.apply(p, x, spec, mask), compiler_options=QUICK)(
        params, x
    )


def _noisy(blueprint: Blueprint, spec: AdapterSpec) -> Any:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: blueprint.init(key, spec, jnp.float32), jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes
    )


@pytest.mark.parametrize("name", [name for name, topology in CASES if topology == "sequence"])
def test_no_adapter_leaks_the_future(name: str) -> None:
    blueprint = FACTORIES[name]()
    spec = AdapterSpec(6, 6, "sequence")
    params, length, at = _noisy(blueprint, spec), 8, 5
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 6)), jnp.float32)
    before = _apply(blueprint, params, x, spec)
    after = _apply(blueprint, params, x.at[:, at].add(1.0), spec)
    assert same_bits(before[:, :at], after[:, :at])
    if name != "noop":
        assert np.all(np.any(np.asarray(before[:, at] != after[:, at]), axis=-1))


def test_attention_sees_the_future_only_when_asked_to() -> None:
    blueprint = ef.blueprints.self_attention(4, is_causal=False)
    spec = AdapterSpec(6, 6, "sequence")
    params = _noisy(blueprint, spec)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 6)), jnp.float32)
    other = _apply(blueprint, params, x.at[:, 5].add(1.0), spec)
    assert np.any(np.asarray(other[:, :5] != _apply(blueprint, params, x, spec)[:, :5]))


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_padding_has_no_influence(name: str, topology: Any) -> None:
    """A narrow chunk's adapter gives what the same parameters give without their padded part."""
    blueprint, (inner, width) = FACTORIES[name](), (3, 4)
    spec = AdapterSpec(width, width, topology)
    params = _noisy(blueprint, spec)
    x = jnp.asarray(
        np.random.default_rng(0).standard_normal((*SHAPES[topology], width)), jnp.float32
    )
    mask = jnp.arange(width) < inner
    x = x.at[..., inner:].set(0.0)
    r = jax.jit(lambda p: blueprint.apply(p, x, spec, mask), compiler_options=QUICK)(params)

    small = AdapterSpec(inner, inner, topology)
    shapes = jax.eval_shape(lambda key: blueprint.init(key, small, jnp.float32), jax.random.key(0))
    cut = jax.tree.map(lambda leaf, s: leaf[tuple(slice(n) for n in s.shape)], params, shapes)
    want = _apply(blueprint, cut, x[..., :inner], small)
    np.testing.assert_allclose(r[..., :inner], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FACTORIES)
def test_check_accepts_every_registered_blueprint(name: str) -> None:
    ef.blueprints.check(FACTORIES[name]())


@pytest.mark.parametrize("good", [ef.blueprints.low_rank(2), ef.blueprints.bottleneck(3)])
def test_check_accepts_a_form_that_cannot_span(good: Blueprint) -> None:
    ef.blueprints.check(good._replace(can_span=False))


def _planted(**changes: Any) -> Blueprint:
    good = ef.blueprints.low_rank(2)
    return good._replace(**{"name": "planted", "topologies": ("vector",), **changes})


def _init_with(value: str) -> Any:
    def init(key: Any, spec: AdapterSpec, dtype: Any) -> Any:
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


def _renamed() -> Any:
    good = ef.blueprints.low_rank(2)

    def init(key: Any, spec: AdapterSpec, dtype: Any) -> Any:
        made = good.init(key, spec, dtype)
        return {"first": made["down"], "up": made["up"]}

    def apply(params: Any, x: Any, spec: AdapterSpec, mask: Any) -> Any:
        return good.apply({"down": params["first"], "up": params["up"]}, x, spec, mask)

    return {"init": init, "apply": apply, "init_along": None}


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
            {
                "apply": lambda p, x, s, m: ef.blueprints.low_rank(2).apply(
                    p, x.astype("float32"), s, m
                )
            },
            r"apply must return \(3, 8\) bfloat16, got \(3, 8\) float32",
        ),
        ({"activation": "relu"}, "apply is not the form that activation='relu' names"),
        ({"activation": "none", **_renamed()}, r"parameters must be a dict of `down`.*'first'"),
        ({"topologies": ()}, r"topologies must be some of .*, got \(\)"),
        ({"topologies": ("graph",)}, r"topologies must be some of .*, got \('graph',\)"),
    ],
)
def test_check_names_what_is_wrong(changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"'planted'.*{words}"):
        ef.blueprints.check(_planted(**changes))


def test_sizes_and_topologies_of_the_factories() -> None:
    assert set(TOPOLOGIES) == {topology for _, topology in CASES}
    assert ef.blueprints.low_rank(rank=5).cost(AdapterSpec(8, 8, "vector"), 1).parameters == 80
    for name in ("low_rank", "bottleneck", "gated", "normalised", "squeeze_excite"):
        size = "rank" if name == "low_rank" else "width"
        with pytest.raises(ValueError, match=f"{size} must be a positive int, got 0"):
            FACTORIES[name](**{size: 0})
    with pytest.raises(ValueError, match="window must be a positive int, got True"):
        ef.blueprints.depthwise_conv(window=True)
    with pytest.raises(ValueError, match=r"activation must be one of \['gelu', .*, got 'tanh'"):
        ef.blueprints.bottleneck(activation="tanh")  # type: ignore[arg-type]


def test_costs_count_operations_by_position() -> None:
    one, many = (
        ef.blueprints.bottleneck(4).cost(AdapterSpec(8, 6, "sequence"), positions)
        for positions in (1, 5)
    )
    assert one.parameters == many.parameters == 4 * 8 + 4 + 4 * 6
    assert many.flops == 5 * one.flops
    assert one.flops == 2 * (4 * 8 + 4 * 6) + 2 * 4  # two products, a bias and a ReLU


def test_check_wants_the_dtype_of_the_activation() -> None:
    wrong = _planted(
        activation=None, apply=lambda params, x, spec, mask: x @ params["down"] @ params["up"]
    )
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(
            ValueError,
            match=r"bfloat16: apply must return the dtype of x, .* convert them, `leaf\.ast",
        ),
    ):
        ef.blueprints.check(wrong)
