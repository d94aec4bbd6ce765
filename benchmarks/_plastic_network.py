"""The multilayer perceptron of all rivals in plain `jnp`, and what an arm of the comparison is.

An `Arm` is a pair of pure functions whose hyperparameters are arrays, so that a sweep over them is
one program (`vmap`). A `Method` acts after each update of the optimiser, on the parameters, the
optimiser's moments and statistics of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks._streams import Batch, Stream

Params = list[tuple[jax.Array, jax.Array]]
"""Of each layer the weights `[inputs, outputs]` and the bias `[outputs]`."""


class Hyper(NamedTuple):
    """Hyperparameters of all methods; each reads its own. Zero switches a method off."""

    rate: Any = 1e-3
    l2: Any = 0.0
    """Factor of `|params|^2 / 2` in the loss."""
    shrink: Any = 0.0
    """Share that all parameters lose in each step."""
    noise: Any = 0.0
    """Factor of a fresh initialisation that is added in each step."""
    dormant: Any = 0.0
    """Share of its layer's mean activity at or below which a unit is dormant."""
    period: Any = 1000
    """Steps between two looks at the units."""
    replacement: Any = 0.0
    """Share of the mature units that are replaced in each step."""
    maturity: Any = 100
    """Steps for which a new unit is safe."""
    percentile: Any = 0.98
    """Share of a unit's silences that may not reset it."""
    adapter_rate: Any = 1e-3
    """Learning rate of adapters; only of the grown arm."""


class Arm(NamedTuple):
    """A learner on a stream."""

    name: str
    init: Callable[[jax.Array, Hyper], Any]
    """`init(key, hyper) -> state`."""
    step: Callable[[Any, Batch, Hyper], tuple[Any, jax.Array]]
    """`step(state, batch, hyper) -> (state, metric)`, the metric from before the update."""
    survey: Callable[[Any, Batch, Hyper], Any] | None = None
    """`survey(state, batch, hyper) -> state`, now and then, on the batches that came last."""
    num_parameters: int = 0
    """At most, for arms that grow."""


class Moments(NamedTuple):
    """Adam's state; every parameter has a step count of its own."""

    mean: Params
    square: Params
    steps: Params


class State(NamedTuple):
    """All that a rival carries from step to step."""

    params: Params
    moments: Moments | None
    statistics: Any
    key: jax.Array
    step: jax.Array


class Method(NamedTuple):
    """What keeps a network plastic."""

    init: Callable[[Params], Any]
    """`init(params) -> statistics`."""
    update: Callable[[State, Sequence[jax.Array], Hyper], State]
    """`update(state, hidden, hyper) -> state`, after the optimiser's update."""


def init_params(key: jax.Array, widths: Sequence[int]) -> Params:
    """Draws weights uniformly with variance 2 / inputs, 1 / inputs in the last layer (He et al.).

    Args:
      key: of the draw.
      widths: of the layers, inputs and outputs included.
    """
    layers = []
    for k, (inputs, outputs) in enumerate(pairwise(widths)):
        gain = 1.0 if k == len(widths) - 2 else 2.0
        bound = (3 * gain / inputs) ** 0.5
        of_layer = jax.random.fold_in(key, k)
        weights = jax.random.uniform(of_layer, (inputs, outputs), minval=-bound, maxval=bound)
        layers.append((weights, jnp.zeros((outputs,))))
    return layers


def count_parameters(widths: Sequence[int]) -> int:
    """Counts the parameters of a network.

    >>> count_parameters((2, 3, 1))
    13
    """
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))


def matched_widths(widths: Sequence[int], num_parameters: int) -> tuple[int, ...]:
    """Widens the hidden layers alike until there are at least `num_parameters`.

    >>> matched_widths((2, 3, 1), 15)
    (2, 4, 1)
    """
    first, *hidden, last = widths
    extra = 0
    while True:
        wider = (first, *(width + extra for width in hidden), last)
        if count_parameters(wider) >= num_parameters:
            return wider
        extra += 1


def forward(params: Params, inputs: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Computes the outputs, and the activations of each hidden layer (ReLU)."""
    hidden, x = [], inputs
    for weights, bias in params[:-1]:
        x = jax.nn.relu(x @ weights + bias)
        hidden.append(x)
    weights, bias = params[-1]
    return x @ weights + bias, hidden


def init_moments(params: Params) -> Moments:
    """Returns Adam's state before the first step."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Moments(mean=zeros, square=zeros, steps=zeros)


def adam(
    params: Params, moments: Moments, gradients: Params, rate: jax.Array
) -> tuple[Params, Moments]:
    """Makes a step of Adam (Kingma & Ba, ICLR 2015) with a step count for every parameter."""
    b1, b2, epsilon = 0.9, 0.999, 1e-8
    mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments.mean, gradients)
    square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, moments.square, gradients)
    steps = jax.tree.map(lambda n: n + 1, moments.steps)

    def move(p: jax.Array, m: jax.Array, v: jax.Array, n: jax.Array) -> jax.Array:
        return p - rate * (m / (1 - b1**n)) / (jnp.sqrt(v / (1 - b2**n)) + epsilon)

    params = jax.tree.map(move, params, mean, square, steps)
    return params, Moments(mean=mean, square=square, steps=steps)


def make_arm(
    name: str,
    stream: Stream,
    method: Method,
    *,
    optimizer: str = "adam",
    widths: Sequence[int] | None = None,
) -> Arm:
    """Makes a learner from a method.

    Args:
      name: in tables.
      stream: what it learns from.
      method: what keeps it plastic.
      optimizer: `adam` or `sgd`.
      widths: of the layers; the host's when left out.

    Raises:
      ValueError: an unknown optimiser.
    """
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f'optimizer must be "adam" or "sgd", got {optimizer!r}')
    layers = tuple(stream.widths if widths is None else widths)

    def init(key: jax.Array, hyper: Hyper) -> State:
        del hyper
        params = init_params(jax.random.fold_in(key, 0), layers)
        return State(
            params=params,
            moments=init_moments(params) if optimizer == "adam" else None,
            statistics=method.init(params),
            key=jax.random.fold_in(key, 1),
            step=jnp.int32(0),
        )

    def step(state: State, batch: Batch, hyper: Hyper) -> tuple[State, jax.Array]:
        inputs, targets = batch

        def loss_fn(params: Params) -> tuple[jax.Array, Any]:
            outputs, hidden = forward(params, inputs)
            return stream.loss(outputs, targets), (stream.metric(outputs, targets), hidden)

        gradients, (metric, hidden) = jax.grad(loss_fn, has_aux=True)(state.params)
        gradients = jax.tree.map(lambda g, p: g + hyper.l2 * p, gradients, state.params)
        if state.moments is None:
            params = jax.tree.map(lambda p, g: p - hyper.rate * g, state.params, gradients)
            moments = None
        else:
            params, moments = adam(state.params, state.moments, gradients, hyper.rate)
        state = state._replace(params=params, moments=moments, step=state.step + 1)
        return method.update(state, hidden, hyper), metric

    return Arm(name=name, init=init, step=step, num_parameters=count_parameters(layers))


def reset_units(state: State, is_reset: Sequence[jax.Array]) -> State:
    """Makes hidden units new: fresh incoming weights, no bias, no outgoing weights, no moments.

    Args:
      state: before.
      is_reset: `[units]` of each hidden layer.
    """
    fresh = init_params(jax.random.fold_in(state.key, state.step), sizes(state.params))
    silent = [jnp.zeros((state.params[0][0].shape[0],), bool), *is_reset]
    renewed = [*is_reset, jnp.zeros((state.params[-1][1].shape[0],), bool)]
    params, is_new = [], []
    for (weights, bias), (drawn, _), out, into in zip(
        state.params, fresh, silent, renewed, strict=True
    ):
        rest = jnp.where(out[:, None], 0.0, weights)
        params.append((jnp.where(into, drawn, rest), jnp.where(into, 0.0, bias)))
        is_new.append((out[:, None] | into, into))
    return state._replace(params=params, moments=forget(state.moments, is_new))


def forget(moments: Moments | None, is_new: Any) -> Moments | None:
    """Clears the moments and step counts where `is_new`, a tree as the parameters, is true."""
    if moments is None:
        return None
    return Moments(
        *(jax.tree.map(lambda m, n: jnp.where(n, 0.0, m), part, is_new) for part in moments)
    )


def sizes(params: Params) -> list[int]:
    """Returns the widths of the layers, inputs and outputs included."""
    return [params[0][0].shape[0], *(bias.shape[0] for _, bias in params)]


def hidden_numbers(params: Params, fill: float = 0.0) -> list[jax.Array]:
    """A number for every hidden unit."""
    return [jnp.full(bias.shape, fill) for _, bias in params[:-1]]
