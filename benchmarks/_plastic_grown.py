"""The arm of a stream that grows: the host of the rivals with seeds around its hidden layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import esper_fn as ef
from benchmarks._plastic_network import (
    Arm,
    Hyper,
    Params,
    count_parameters,
    init_params,
)
from benchmarks._streams import Batch, Stream
from esper_fn import runtime
from esper_fn.lifecycle._commands import no_commands


def grown(
    stream: Stream,
    *,
    name: str = "grown",
    policy: ef.policies.Policy | None = None,
    optimizer: str = "adam",
    spans: int = 2,
    width: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Arm:
    """Makes an arm that grows neurons around every hidden layer.

    Site `layer{k}.{i}` leads from the input of hidden layer k to its successor's pre-activation, so
    an adapter is `width` more neurons of that layer. `hyper.rate` is the learning rate of the host,
    `hyper.adapter_rate` that of the adapters. There are no snapshots to roll back to, since under
    `vmap` each step would copy them all. Surveys see batches that have been learned from before.

    Args:
      stream: what it learns from.
      name: in tables.
      policy: decides where and when; the default of `Growth` when left out.
      optimizer: `adam` or `sgd`.
      spans: seeds around each hidden layer.
      width: neurons of an adapter; an eighth of the narrowest hidden layer, at least 2, when left
        out.
      options: more arguments of `Growth`.

    Returns:
      The arm; `num_parameters` counts the host and all adapters.
    """
    widths = stream.widths
    growth = _make_growth(widths, spans, width, policy=policy, **(options or {}))

    def loss_fn(params: Params, seeds: Any, batch: Batch) -> jax.Array:
        return stream.loss(_forward(params, seeds, batch[0], spans), batch[1])

    def init(key: jax.Array, hyper: Hyper) -> runtime.TrainState:
        params = init_params(jax.random.fold_in(key, 0), widths)
        start = growth.init(jax.random.fold_in(key, 1))
        return runtime.init(_make_optimizer(optimizer, hyper), params, start, snapshot_every=None)

    def step(
        state: runtime.TrainState, batch: Batch, hyper: Hyper
    ) -> tuple[runtime.TrainState, jax.Array]:
        seeds = growth.seeds(state.growth_state)
        metric = stream.metric(_forward(state.params, seeds, batch[0], spans), batch[1])
        advance = runtime.make_step(
            growth, loss_fn, _make_optimizer(optimizer, hyper), survey_every=None
        )
        return advance(state, batch, None, no_commands(1))[0], metric

    measure = runtime.make_survey(growth, loss_fn)
    return Arm(
        name=name,
        init=init,
        step=step,
        survey=lambda state, batch, hyper: measure(state, batch),
        num_parameters=count_parameters(widths) + _count_adapters(growth),
    )


def _make_growth(widths: Sequence[int], spans: int, width: int | None, **options: Any) -> ef.Growth:
    """The seeds of `grown`; every slot is computed, as `vmap` over whole states needs it."""
    size = max(2, min(widths[1:-1]) // 8) if width is None else width
    return ef.Growth(
        sites=[
            ef.site(f"layer{k}.{i}", source_features=widths[k - 1], features=widths[k + 1])
            for k in range(1, len(widths) - 1)
            for i in range(spans)
        ],
        blueprints={"bottleneck": ef.blueprints.bottleneck(width=size)},
        capacity=1,
        adapters_at_once=None,
        **options,
    )


def _count_adapters(growth: ef.Growth) -> int:
    """Counts the parameters of all slots."""
    tables = growth.layout.tables
    return int(sum(tables.costs[tables.slot_group, tables.slot_blueprint]))


def _make_optimizer(name: str, hyper: Hyper) -> optax.GradientTransformationExtraArgs:
    """Made anew in every trace, so that both rates may be traced and mapped."""
    make = {"adam": optax.adam, "sgd": optax.sgd}[name]
    return ef.optim.per_adapter(make(hyper.rate), make(hyper.adapter_rate))


def _forward(params: Params, seeds: Any, inputs: jax.Array, spans: int) -> jax.Array:
    """Computes the outputs of the host and its adapters."""
    read = inputs
    x = inputs @ params[0][0] + params[0][1]
    for k, (weights, bias) in enumerate(params[1:], 1):
        hidden = jax.nn.relu(x)
        x = hidden @ weights + bias
        for i in range(spans):
            x = seeds.grow(f"layer{k}.{i}", x, source=read)
        read = hidden
    return jnp.asarray(x)
