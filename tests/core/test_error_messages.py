"""What a wrong argument is answered: its name, what came, what is allowed, the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import esper_fn as ef
from esper_fn import commands as cmd
from esper_fn import runtime
from esper_fn._layout import make_layout
from esper_fn.blueprints import Cost
from esper_fn.types import Layout

X = jnp.ones((4, 6))


def layout(name: str = "a", chunks: int = 2, rank: int = 1) -> Layout:
    return make_layout(
        sites=[ef.site(name, features=6, chunks=chunks)],
        blueprints={"low_rank": ef.blueprints.low_rank(rank)},
        capacity=2,
    )


LAYOUT = layout()
GROWTH = ef.Growth(**LAYOUT.arguments, policy=ef.policies.never())
OTHERS = {
    "seeds": ef.Growth(**layout(chunks=3).arguments, policy=ef.policies.never()),
    "site": ef.Growth(**layout(name="b").arguments, policy=ef.policies.never()),
    "rank": ef.Growth(**layout(rank=2).arguments, policy=ef.policies.never()),
    "policy": ef.Growth(**LAYOUT.arguments, policy=ef.policies.periodic(every=3)),
    "governor": ef.Growth(
        **LAYOUT.arguments, policy=ef.policies.never(), governor=ef.governors.disabled()
    ),
    "grafts": ef.Growth(
        **LAYOUT.arguments,
        policy=ef.policies.never(),
        graft=[ef.grafting.linear(), ef.grafting.adaptive()],
    ),
}


def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(seeds.grow("a", x) * params)


@cache
def state_of(growth: ef.Growth) -> Any:
    return jax.eval_shape(growth.init, jax.random.key(0))


def trace(run: Callable[..., Any], *args: Any) -> Any:
    """Only traced: a message must come before anything is compiled."""
    return jax.eval_shape(run, *args)


STATE = state_of(GROWTH)
P = jnp.ones(())
READINGS = trace(GROWTH.value_and_grad(loss_fn), P, STATE, X)[2]
VALUE = GROWTH.value_and_grad(loss_fn)
UPDATE = GROWTH.update
LOSS = jnp.float32(1.0)
ADAPTERS = STATE.adapters
Builder = Callable[[], Any]


def step(**changes: Any) -> Any:
    given = {"state": STATE, "adapters": ADAPTERS, "statistics": READINGS, "loss": LOSS}
    commands = changes.pop("commands", None)
    return trace(lambda given: UPDATE(**given, commands=commands), {**given, **changes})


def returning(value: Callable[[jax.Array], Any], **options: Any) -> Any:
    def run(params: Any, state: Any, x: jax.Array) -> Any:
        return GROWTH.value_and_grad(
            lambda params, seeds, x: value(seeds.grow("a", x) * params), **options
        )(params, state, x)

    return trace(run, P, STATE, X)


def surveyed(value: Callable[[jax.Array], Any]) -> Any:
    measure = GROWTH.survey(lambda params, seeds, x: value(seeds.grow("a", x) * params))
    return trace(measure, P, STATE, X)


def closed_over() -> Any:
    def run(params: Any, state: Any, x: jax.Array) -> Any:
        outside = GROWTH.seeds(state)
        return GROWTH.value_and_grad(lambda p, seeds, x: loss_fn(p, outside, x))(params, state, x)

    return trace(run, P, STATE, X)


class Dropping(nnx.Module):
    def __init__(self) -> None:
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.grow = ef.flax.nnx.Grow("a")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.grow(self.drop(x))


class Normalised(nnx.Module):
    def __init__(self) -> None:
        self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ef.flax.nnx.Grow("a")(self.norm(x))


class Conv(nn.Module):
    topology: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ef.flax.linen.Grow("a", topology=self.topology)(x)


def blueprint(**parts: Any) -> Any:
    return ef.blueprints.low_rank(1)._replace(name="own", **parts)


BAD_STATES: dict[str, tuple[Builder, str]] = {
    "update, swapped": (
        lambda: step(state=ADAPTERS, adapters=STATE),
        r"state must be a GrowthState, got a dict; the call is update\(state, adapters, statistics",
    ),
    "update, seeds": (
        lambda: trace(lambda s: UPDATE(GROWTH.seeds(s), ADAPTERS, READINGS, LOSS), STATE),
        r"state must be a GrowthState, got a Seeds; .*`growth\.init\(key\)`",
    ),
    "adapters are the pair": (
        lambda: step(adapters=(P, ADAPTERS)),
        r"adapters must be a Mapping, got a tuple; .*second half of what `optax\.apply_updates",
    ),
    "adapters of another": (
        lambda: step(adapters=state_of(OTHERS["site"]).adapters),
        r"adapters\['a'\]\['low_rank'\] is missing",
    ),
    "statistics and loss, swapped": (
        lambda: step(statistics=LOSS, loss=READINGS),
        r"statistics must be a Statistics, got .*; pass what `growth\.value_and_grad` returns",
    ),
    "value_and_grad, swapped": (
        lambda: trace(VALUE, STATE, P, X),
        r"state must be a GrowthState, got .*; the call is \(params, state, \*args\)",
    ),
    "value_and_grad, seeds": (
        lambda: trace(lambda s: VALUE(P, GROWTH.seeds(s), X), STATE),
        "state must be a GrowthState, got a Seeds",
    ),
    "survey, swapped": (
        lambda: trace(GROWTH.survey(loss_fn), STATE, P, X),
        r"state must be a GrowthState, got .*; the call is \(params, state",
    ),
    "seeds of seeds": (
        lambda: trace(lambda s: GROWTH.seeds(GROWTH.seeds(s)), STATE),
        "state must be a GrowthState, got a Seeds",
    ),
    "slots of adapters": (
        lambda: trace(lambda s: GROWTH.slots(s.adapters), STATE),
        "state must be a GrowthState, got a dict",
    ),
    "step, growth state": (
        lambda: trace(
            runtime.make_step(GROWTH, loss_fn, ef.optim.per_adapter(optax.sgd(0.1))),
            STATE,
            X,
            X,
            GROWTH.commands(),
        ),
        r"state must be a TrainState, got a GrowthState; make it with `runtime\.init",
    ),
    **{
        f"other {name}": (lambda of=other: trace(VALUE, P, state_of(of), X), wanted)
        for (name, other), wanted in zip(
            OTHERS.items(),
            (
                r"state has \(3,\) seeds, this growth has 2; use the state of this growth's own",
                r"state\.adapters\['a'\]\['low_rank'\] is missing",
                r"state\.adapters\['a'\]\['low_rank'\] has leaves of shapes \[\(2, 3, 2\), ",
                r"state\.policy belongs to another policy than this growth's",
                r"state\.governor belongs to another governor than this growth's",
                r"state\.grafts has 2 alpha schedules, this growth has \['linear'\]",
            ),
            strict=True,
        )
    },
}
BAD_LOSSES: dict[str, tuple[Builder, str]] = {
    "update, vector": (
        lambda: step(loss=jnp.ones(3)),
        r"loss must be one number, got an array of shape \(3,\); reduce it, with `jnp\.mean`",
    ),
    "update, one in a row": (lambda: step(loss=jnp.ones((1,))), r"shape \(1,\); reduce it"),
    "update, complex": (
        lambda: step(loss=jnp.complex64(1)),
        "loss must be a real .* got complex64",
    ),
    "update, flag": (lambda: step(loss=jnp.bool_(True)), "loss must be a real .* got bool"),
    "update, none": (
        lambda: step(loss=None),
        "loss must be one number, got None",
    ),
    "vector": (
        lambda: returning(lambda y: y),
        r"what loss_fn returns must be one number, got an array of shape \(4, 6\); reduce",
    ),
    "integer": (
        lambda: returning(lambda y: jnp.sum(y).astype(int)),
        "what loss_fn returns must be a real floating number, got int32; convert it",
    ),
    "tuple": (
        lambda: returning(lambda y: (jnp.mean(y), y)),
        "what loss_fn returns must be one number, got a tuple; .* set has_aux=True",
    ),
    "no tuple": (
        lambda: returning(jnp.mean, has_aux=True),
        r"what loss_fn returns must be `\(loss, aux\)` with has_aux, got",
    ),
    "none": (
        lambda: returning(lambda y: None),
        "what loss_fn returns must be one number, got None",
    ),
    "survey, vector": (
        lambda: surveyed(lambda y: y),
        r"one number, got an array of shape \(4, 6\)",
    ),
}
BAD_COMMANDS: dict[str, tuple[Builder, str]] = {
    "a list": (
        lambda: step(commands=[cmd.cull(1)]),
        r"commands must be Commands or None, got a list; pack them .* `growth\.commands\(\[",
    ),
    "a list, compiled": (
        lambda: trace(UPDATE, STATE, ADAPTERS, READINGS, LOSS, [cmd.cull(1)]),
        "commands must be Commands or None, got a list",
    ),
    "one": (lambda: step(commands=cmd.cull(1)), "got one Command; pack them"),
    "one to pack": (
        lambda: GROWTH.commands(cmd.cull(1)),  # type: ignore[arg-type]
        "commands must be a list of Command, got a Command; pass a list",
    ),
    "packed twice": (
        lambda: GROWTH.commands(GROWTH.commands()),  # type: ignore[arg-type]
        "commands must be a list of Command, got a Commands",
    ),
    "words": (
        lambda: GROWTH.commands(["cull"]),  # type: ignore[list-item]
        "each command must be a Command, got 'cull'",
    ),
    "not called": (
        lambda: GROWTH.commands([cmd.cull]),  # type: ignore[list-item]
        "each command must be a Command, got the function cull, not called",
    ),
    "a seed by name": (
        lambda: GROWTH.commands([cmd.cull("a")]),  # type: ignore[arg-type]
        r"seed 'a' does not exist; seeds are the ints 0\.\.1; `layout\.seed_index",
    ),
    "a stage by name": (
        lambda: cmd.transition(0, "culled"),  # type: ignore[arg-type]
        r"unknown stage in target: 'culled'; allowed: .*CULLED.*; write `ef\.Stage\.CULLED`",
    ),
    "no stage": (
        lambda: cmd.transition(0, 77),  # type: ignore[arg-type]
        "unknown stage in target: 77; allowed: .*write a member of `ef.Stage`",
    ),
    "min_steps by name": (
        lambda: ef.lifecycle.settings(min_steps={"TRAINING": 3}),  # type: ignore[dict-item]
        r"unknown stage in min_steps: 'TRAINING'; .*write `ef\.Stage\.TRAINING`, not its name",
    ),
    "freeze, no list": (
        lambda: ef.lifecycle.settings(freeze=ef.Stage.FOSSILIZED),  # type: ignore[arg-type]
        r"freeze must be a list of stages, `freeze=\[Stage\.FOSSILIZED\]` .* got <Stage",
    ),
    "freeze, a name": (
        lambda: ef.lifecycle.settings(freeze="FOSSILIZED"),  # type: ignore[arg-type]
        "freeze must be a list of stages, .* got 'FOSSILIZED'",
    ),
    "key, a number": (
        lambda: GROWTH.init(0),  # type: ignore[arg-type]
        r"key must be a random key, `jax\.random\.key\(0\)` say, got 0",
    ),
    "max_steps by name": (
        lambda: ef.lifecycle.settings(max_steps={"Training": 3}),  # type: ignore[dict-item]
        "unknown stage in max_steps: 'Training'",
    ),
}


def grow(**options: Any) -> Any:
    return ef.Growth(**LAYOUT.arguments, **options)


BAD_PARTS: dict[str, tuple[Builder, str]] = {
    "policy": (
        lambda: grow(policy=ef.policies.plateau),
        r"policy must be a Policy, got the function plateau, not called; .*policies\.plateau\(",
    ),
    "policy, the default": (
        lambda: grow(policy=ef.policies.grow),
        r"policy must be a Policy, got the function grow, not called; .*policies\.grow\(",
    ),
    "policy by name": (lambda: grow(policy="plateau"), "policy must be a Policy, got 'plateau'"),
    "policies": (lambda: grow(policy=[ef.policies.never()]), "policy must be a Policy, got a list"),
    "graft": (
        lambda: grow(graft=ef.grafting.linear),
        "graft must be an AlphaSchedule, got the function linear, not called",
    ),
    "grafts": (lambda: grow(graft=[ef.grafting.linear]), "got the function linear, not called"),
    "governor": (
        lambda: grow(governor=ef.governors.standard),
        "governor must be a Governor, got the function standard, not called",
    ),
    "settings": (
        lambda: grow(settings=ef.lifecycle.settings),
        "settings must be a Settings, got the function settings, not called",
    ),
    "settings, a dict": (lambda: grow(settings={"max_training": 3}), "settings .* got a dict"),
    "chain": (
        lambda: ef.policies.chain(ef.policies.plateau),  # type: ignore[arg-type]
        "a link of the chain must be a Policy, got the function plateau, not called",
    ),
    "chain of a list": (
        lambda: ef.policies.chain([ef.policies.never()]),  # type: ignore[arg-type]
        "a link of the chain must be a Policy, got a list",
    ),
    "budget alone": (
        lambda: grow(policy=ef.policies.chain(ef.policies.budget(100))),
        r"its rules are \['budget'\], and 'budget' only limits .*nothing would ever grow; put",
    ),
    "limits alone": (
        lambda: grow(policy=ef.policies.chain(ef.policies.max_total(1), ef.policies.stop_after(9))),
        "'max_total' only limits what rules before it ask for, so nothing would ever grow",
    ),
    "a limit first": (
        lambda: grow(policy=ef.policies.chain(ef.policies.budget(9), ef.policies.plateau())),
        r"'budget' only limits .*so it would limit nothing of \['plateau'\]",
    ),
    "blueprint": (
        lambda: make_layout(
            sites=LAYOUT.sites,
            blueprints={"x": ef.blueprints.low_rank},  # type: ignore[dict-item]
            capacity=1,
        ),
        r"blueprints\['x'\] must be a Blueprint, got the function low_rank, not called; call",
    ),
    "blueprints, a list": (
        lambda: make_layout(
            sites=LAYOUT.sites,
            blueprints=[ef.blueprints.low_rank()],  # type: ignore[arg-type]
            capacity=1,
        ),
        "blueprints must be a dict of names and blueprints, got a list",
    ),
    "one site": (
        lambda: make_layout(sites="a", blueprints={}, capacity=1),  # type: ignore[arg-type]
        "sites: each must be a Site, got 'a'; make a list",
    ),
    "site": (
        lambda: make_layout(sites=[ef.site], blueprints={}, capacity=1),  # type: ignore[list-item]
        "sites: each must be a Site, got the function site, not called",
    ),
    "topology": (
        lambda: ef.site("a", features=6, topology="conv"),  # type: ignore[arg-type]
        r"topology must be one of .*, got 'conv'; it is `image` for \[\.\.\., H, W, D\]",
    ),
    "topology of a module": (
        lambda: ef.discover_sites(lambda x: Conv("conv").apply({}, x), X),
        r"site 'a': topology must be one of .*, got 'conv'; it is `image`",
    ),
    "topology that does not fit": (
        lambda: ef.discover_sites(lambda x: Conv("image").apply({}, x), X),
        r"topology='image' needs an activation of at least 3 axes, got \(4, 6\)",
    ),
    "no activation": (
        lambda: ef.discover_sites(lambda x: ef.flax.nnx.Grow("a")((x, x)), X),  # type: ignore[arg-type]
        "site 'a': x must be an array, got a tuple",
    ),
    "dropout": (
        lambda: ef.discover_sites(Dropping(), X),
        r"the model changes its own state .* call `model\.eval\(\)` first",
    ),
    "running statistics": (lambda: ef.discover_sites(Normalised(), X), r"`model\.eval\(\)` first"),
    "closed over": (
        closed_over,
        r"never reaches site\(s\) \['a'\] with the seeds that it is given; .*closed over or of",
    ),
    "using a state": (lambda: ef.use_seeds(STATE).__enter__(), "got a GrowthState; take those"),
    "using None": (lambda: ef.use_seeds(None).__enter__(), "got None"),  # type: ignore[arg-type]
}
BAD_OPTIMISERS: dict[str, tuple[Builder, str]] = {
    "init, plain": (
        lambda: trace(lambda s: runtime.init(optax.adam(0.1), P, s), STATE),  # type: ignore[arg-type]
        r"got an Optax transformation, .*inherits the moments of a dead one; use `ef\.optim\.per_",
    ),
    "step, plain": (
        lambda: trace(
            lambda s, o: runtime.make_step(GROWTH, loss_fn, optax.adam(0.1))(  # type: ignore[arg-type]
                runtime.TrainState(P, o, s, None), X, X, GROWTH.commands()
            ),
            STATE,
            jax.eval_shape(optax.adam(0.1).init, (P, ADAPTERS)),
        ),
        "got an Optax transformation, .*inherits the moments",
    ),
    "not called": (
        lambda: trace(lambda s: runtime.init(ef.optim.per_adapter, P, s), STATE),  # type: ignore[arg-type]
        r"optimizer must be from optim\.per_adapter, got the function per_adapter, not called",
    ),
    "host not called": (
        lambda: ef.optim.per_adapter(optax.adam),
        r"host must be an Optax transformation, got the function adam, not called; `host=optax",
    ),
    "a rate": (lambda: ef.optim.per_adapter(0.1), "host must be an Optax transformation, got 0.1"),
    "adapters not called": (
        lambda: ef.optim.per_adapter(optax.sgd(0.1), optax.sgd),
        "adapters must be an Optax transformation, got the function sgd, not called",
    ),
    "twice": (
        lambda: ef.optim.per_adapter(ef.optim.per_adapter(optax.sgd(0.1))).init((P, ADAPTERS)),
        r"init takes the pair \(host parameters, adapters\)",
    ),
    "labels": (
        lambda: trace(
            ef.optim.per_adapter(
                optax.multi_transform({"x": optax.sgd(0.1)}, {"w": "x", "v": "x"})
            ).init,
            ({"w": P, "v": P}, ADAPTERS),
        ),
        r"does not fit the adapters 'low_rank' of site 'a'.* or give the adapters their own",
    ),
    "a mask": (
        lambda: trace(
            ef.optim.per_adapter(optax.masked(optax.adam(0.1), {"w": True, "v": False})).init,
            ({"w": P, "v": P}, ADAPTERS),
        ),
        "does not fit the adapters 'low_rank'",
    ),
    "a mask of decay": (
        lambda: trace(
            ef.optim.per_adapter(optax.adamw(0.1, mask={"w": True, "v": False})).init,
            ({"w": P, "v": P}, ADAPTERS),
        ),
        "does not fit the adapters 'low_rank'",
    ),
    "params with words": (
        lambda: trace(lambda s: VALUE({"w": P, "name": "x"}, s, X), STATE),
        r"params\['name'\] must be an array or a number, got 'x'; keep what is neither out",
    ),
    "init, params with words": (
        lambda: trace(
            lambda s: runtime.init(ef.optim.per_adapter(optax.sgd(0.1)), {"f": jnp.tanh}, s), STATE
        ),
        r"params\['f'\] must be an array or a number, got the function tanh",
    ),
    "init, no state": (
        lambda: runtime.init(ef.optim.per_adapter(optax.sgd(0.1)), P, GROWTH),  # type: ignore[arg-type]
        r"growth_state must be a GrowthState, got a Growth; pass `growth\.init\(key\)`",
    ),
}
BAD_BLUEPRINTS: dict[str, tuple[Builder, str]] = {
    "not called": (
        lambda: ef.blueprints.check(ef.blueprints.low_rank),  # type: ignore[arg-type]
        "blueprint must be a Blueprint, got the function low_rank, not called",
    ),
    **{
        name: (lambda parts=parts: ef.blueprints.check(blueprint(**parts)), wanted)
        for name, parts, wanted in (
            (
                "init",
                {"init": lambda key, spec: {}},
                r"'own': init is called as `init\(key, spec, dtype\)`, its signature is init\(",
            ),
            (
                "apply",
                {"apply": lambda params, x: x},
                r"apply is called as `apply\(params, x, spec, mask\)`, its signature is apply\(",
            ),
            (
                "cost",
                {"cost": lambda spec: Cost(0, 0)},
                r"cost is called as `cost\(spec, positions\)`",
            ),
            (
                "init_along",
                {"init_along": lambda key: {}},
                r"init_along is called as `init_along\(key, spec, dtype, directions\)`",
            ),
            (
                "keyword",
                {"cost": lambda spec, *, positions: Cost(0, 0)},
                r"cost is called as `cost\(spec, positions\)`",
            ),
            ("no function", {"apply": None}, "apply must be a function called as .*, got None"),
            ("no cost", {"cost": lambda s, p: 3}, r"cost must return `Cost\(.*\)`, got 3"),
            (
                "a pair",
                {"apply": lambda params, x, spec, mask: (x, x)},
                "apply must return one array, got a tuple",
            ),
        )
    },
}
TABLES = {
    "state": BAD_STATES,
    "loss": BAD_LOSSES,
    "commands": BAD_COMMANDS,
    "part": BAD_PARTS,
    "optimiser": BAD_OPTIMISERS,
    "blueprint": BAD_BLUEPRINTS,
}
CASES = [
    pytest.param(build, wanted, id=f"{table}: {name}")
    for table, cases in TABLES.items()
    for name, (build, wanted) in cases.items()
]


@pytest.mark.parametrize(("build", "wanted"), CASES)
def test_the_message_names_argument_value_allowed_and_remedy(build: Builder, wanted: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        build()
    message = str(caught.value)
    assert re.search(wanted, message), message


@pytest.mark.parametrize("loss", [2, 2.0, jnp.int32(2), jnp.bfloat16(2), jnp.asarray(2.0)])
def test_a_loss_of_another_type_changes_no_type_of_the_state(loss: Any) -> None:
    after, info = step(loss=loss)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), STATE
    )
    assert info.loss.dtype == jnp.float32
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("made", [optax.adam, optax.sgd, optax.adamw])
def test_a_plain_optimiser_in_a_loop_of_ones_own_is_refused_with_the_remedy(made: Any) -> None:
    growth = ef.Growth(
        sites=[ef.site("a", features=4)],
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=1,
    )
    params, optimizer = jnp.ones((4, 2)), made(1e-3)
    state = growth.init(jax.random.key(0))
    opt_state = optimizer.init((params, state.adapters))
    loss_fn = lambda params, seeds: jnp.sum(seeds.grow("a", jnp.ones((3, 4))) @ params)  # noqa: E731
    _, grads, _ = growth.value_and_grad(loss_fn)(params, state)
    both = (params, state.adapters)

    def learn() -> Any:
        updates, _ = optimizer.update(grads, opt_state, both, slots=growth.slots(state))
        return optax.apply_updates(both, updates)

    with pytest.raises(ValueError, match=r"ef\.optim\.per_adapter"):
        learn()
