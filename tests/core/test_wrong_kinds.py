"""Arguments of a wrong kind: what they are called in the message, what came, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_fn as ef
from esper_fn import bus, runtime
from esper_fn.bus._address import parse_address

GROWTH = ef.Growth(
    sites=[ef.site("a", features=6, chunks=2)],
    blueprints={"scale": ef.blueprints.scale_shift()},
    capacity=1,
    policy=ef.policies.never(),
)
X = jnp.ones((4, 6))
PARAMS = {"w": jnp.ones((6,))}
STATE = jax.eval_shape(GROWTH.init, jax.random.key(0))
BOTH = (PARAMS, STATE.adapters)
OPTIMIZER = ef.optim.per_adapter(optax.adam(0.1))
CALL = r"`optimizer\.update\(gradients, opt_state, \(params, state\.adapters\), slots=growth\.slots"


def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(seeds.grow("a", x) @ params["w"])


def update(change: Callable[..., Any], optimizer: Any = OPTIMIZER) -> Any:
    """A call of `update` with arguments that `change` has changed; only traced."""

    def run(params: Any, state: Any) -> Any:
        _, gradients, _ = GROWTH.value_and_grad(loss_fn)(params, state, X)
        given = {
            "updates": gradients,
            "state": optimizer.init((params, state.adapters)),
            "params": (params, state.adapters),
            "slots": GROWTH.slots(state),
        }
        given = {**given, **change(given, state)}
        return optimizer.update(
            given["updates"], given["state"], given["params"], slots=given["slots"]
        )

    return jax.eval_shape(run, PARAMS, STATE)


def init(*pair: Any) -> Any:
    return jax.eval_shape(OPTIMIZER.init, pair)


OPTIMISER: dict[str, tuple[Callable[[], Any], str]] = {
    "slots, a state": (
        lambda: update(lambda given, state: {"slots": state}),
        r"slots must be what `growth\.slots\(state\)` returns, got a GrowthState without the slots "
        rf"of 'scale' at site 'a'; the call is {CALL}",
    ),
    "slots, adapters": (
        lambda: update(lambda given, state: {"slots": state.adapters}),
        r"slots must be what `growth\.slots\(state\)` returns, got a dict",
    ),
    "the host's parameters alone": (
        lambda: update(lambda given, state: {"params": PARAMS}),
        rf"update takes the pair \(host parameters, adapters\) third: {CALL}.*, got dict",
    ),
    "no parameters": (
        lambda: update(lambda given, state: {"params": None}),
        r"update takes the pair \(host parameters, adapters\) third: .*, got NoneType",
    ),
    "parameters swapped": (
        lambda: update(lambda given, state: {"params": given["params"][::-1]}),
        r"third: .*, in this order; the second one, .* at \['w'\]",
    ),
    "the host's gradients alone": (
        lambda: update(lambda given, state: {"updates": given["updates"][0]}),
        r"update takes the pair of gradients \(d params, d adapters\) of .*, got dict",
    ),
    "the host's state alone": (
        lambda: update(lambda given, state: {"state": given["state"].host}),
        r"update takes the state of this optimiser second, from `optimizer\.init\(.*, got a tuple",
    ),
    "init swapped": (
        lambda: init(STATE.adapters, PARAMS),
        r"init takes the pair \(host parameters, adapters\): .*, in this order; .* at \['w'\]",
    ),
    "init, a whole state": (lambda: init(PARAMS, STATE), "has a GrowthState at its root"),
    "init, a word": (
        lambda: OPTIMIZER.init(({**PARAMS, "name": "x"}, {})),
        r"params\['name'\] must be an array or a number, got 'x'; keep what is neither out",
    ),
    "apply_updates, a word": (
        lambda: ef.optim.apply_updates({"name": "x"}, {"name": 0}),
        r"params\['name'\] must be an array or a number, got 'x'",
    ),
    "survey, a word": (
        lambda: jax.eval_shape(
            lambda state: GROWTH.survey(loss_fn)({**PARAMS, "name": "x"}, state, X), STATE
        ),
        r"params\['name'\] must be an array or a number, got 'x'",
    ),
    **{
        f"{name} around it": (
            lambda wrapper=wrapper: update(
                lambda given, state: {"slots": None}, wrapper(OPTIMIZER)
            ),
            rf"update needs to know which adapters are new and which learn, in `slots=`: .*{CALL}",
        )
        for name, wrapper in (
            ("apply_if_finite", lambda inner: optax.apply_if_finite(inner, 3)),
            ("chain", lambda inner: optax.chain(optax.clip(1.0), inner)),
        )
    },
}
FUNCTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "survey": (lambda: GROWTH.survey(X), "got an ArrayImpl"),  # type: ignore[arg-type]
    "value_and_grad": (lambda: GROWTH.value_and_grad(PARAMS), "got a dict"),  # type: ignore[arg-type]
    "make_step": (lambda: runtime.make_step(GROWTH, None, OPTIMIZER), "got None"),  # type: ignore[arg-type]
    "make_survey": (lambda: runtime.make_survey(GROWTH, 3.0), "got 3.0"),  # type: ignore[arg-type]
    "fit_host": (
        lambda: runtime.fit_host(X, optax.sgd(0.1), PARAMS, lambda *_: X, num_steps=1),  # type: ignore[arg-type]
        "got an ArrayImpl",
    ),
}
NUMBER = "; write it without quotes"
SET = ef.lifecycle.settings
NUMBERS: list[tuple[Callable[..., Any], str, Any, str]] = [
    (SET, "trust", "0.1", f"trust must be a number, got '0.1'{NUMBER}"),
    (SET, "min_stability", "0.1", "min_stability must be a number, got '0.1'"),
    (SET, "max_errors", "3", f"max_errors must be a whole number, got '3'{NUMBER}"),
    (SET, "embargo_steps", None, "embargo_steps must be a whole number, got None"),
    (SET, "min_surveys", np.nan, "min_surveys must be a whole number, got nan"),
    (SET, "train_first", "no", "train_first must be True or False, got 'no'"),
    (SET, "max_steps", [9], "max_steps must be a dict of stages .*, got a list"),
    (
        SET,
        "min_steps",
        {ef.Stage.TRAINING: "9"},
        r"min_steps\[TRAINING\] must be a whole number, got '9'",
    ),
    (ef.policies.budget, "parameters", "50000", f"parameters must be a number, got .*{NUMBER}"),
    (ef.policies.max_concurrent, "limit", [1], "limit must be a whole number, got a list"),
    (ef.policies.max_total, "limit", "1", "limit must be a whole number"),
    (ef.policies.max_total, "limit", -1, "limit must not be negative"),
    (ef.policies.cooldown, "steps", "9", "steps must be a whole number, got '9'"),
    (ef.policies.stop_after, "num_steps", "9", "num_steps must be a whole number, got '9'"),
    (ef.policies.grow, "every", "9", "every must be a whole number, got '9'"),
    (ef.policies.grow, "min_share", "0.3", "min_share must be a number, got '0.3'"),
    (ef.policies.plateau, "patience", None, "patience must be a whole number, got None"),
    (ef.policies.plateau, "min_gain", "0.1", "min_gain must be a number, got '0.1'"),
    (
        partial(ef.policies.periodic, every=2),
        "start",
        "3",
        "start must be a whole number, got '3'",
    ),
    (ef.policies.scripted, "events", [3], r"events must hold pairs \(step, command\), .*, got 3"),
    (ef.policies.scripted, "events", "x", r"events must be a list of \(step, command\), got 'x'"),
    (ef.governors.standard, "max_ratio", "3", "max_ratio must be a number, got '3'"),
    (ef.governors.standard, "patience", "3", "patience must be a whole number, got '3'"),
    (ef.grafting.adaptive, "gain", "0.1", "gain must be a number, got '0.1'"),
    (ef.grafting.stability, "hold_steps", None, "hold_steps must be a number, got None"),
    (ef.grafting.grad_norm_gated, "high", "4", "high must be a number, got '4'"),
    (
        partial(ef.Growth, **GROWTH.layout.arguments),
        "graft",
        "linear",
        r"graft must be an AlphaSchedule, got 'linear'; make one with `ef\.grafting\.linear\(",
    ),
]


@pytest.mark.parametrize(("build", "wanted"), OPTIMISER.values(), ids=OPTIMISER)
def test_calls_of_the_optimiser_are_answered_with_the_right_call(
    build: Callable[[], Any], wanted: str
) -> None:
    with pytest.raises(TypeError) as caught:
        build()
    assert re.search(wanted, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("build", "wanted"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_no_loss_function_is_refused_at_once(build: Callable[[], Any], wanted: str) -> None:
    with pytest.raises(TypeError) as caught:
        build()
    assert re.search(rf"loss_fn must be a function, called as `.*`, {wanted};", str(caught.value))


@pytest.mark.parametrize(
    ("make", "argument", "value", "wanted"),
    NUMBERS,
    ids=[f"{argument}={value!r}" for _, argument, value, _ in NUMBERS],
)
def test_a_number_must_be_one(
    make: Callable[..., Any], argument: str, value: Any, wanted: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        make(**{argument: value})
    assert re.match(wanted, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("number", [3, 3.0, np.int64(3), np.float32(3), jnp.float32(3)])
def test_a_number_may_be_of_any_type(number: Any) -> None:
    settings = ef.lifecycle.settings(max_errors=number, trust=number, train_first=np.True_)
    assert int(settings.max_errors) == float(settings.trust) == 3
    assert bool(settings.train_first)
    for make in (ef.policies.budget, ef.policies.max_total, ef.policies.stop_after):
        assert isinstance(make(number), ef.policies.Policy)


@pytest.mark.parametrize("address", [12, None, b"redis://:hunter2@host:6379", ["memory"]])
def test_an_address_must_be_text(address: Any) -> None:
    for call in (parse_address, partial(bus.connect, run="r")):
        wanted = r"address of a bus must be a string, got .*; write one like memory, redis://"
        with pytest.raises(TypeError, match=wanted) as caught:
            call(address)
        assert "hunter2" not in str(caught.value)
