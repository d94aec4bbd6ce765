"""Streams of data that never stop changing, on which networks lose their plasticity.

A stream is a pure function of a key and a step, so that it is drawn inside the program that learns
from it. All that a learner is told is the batch; only a rival that is called an oracle may read
`task_steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from esper_fn.demo.data import load as load_data

Batch = tuple[jax.Array, jax.Array]
"""Inputs `[B, D]`, and targets: `[B]` classes, or `[B, 1]` numbers."""


class Stream(NamedTuple):
    """A task after another, without a pause."""

    name: str
    widths: tuple[int, ...]
    """Layers of the host, inputs and outputs included."""
    data: Any
    """Arrays that `init` reads; an argument of the program rather than a constant in it."""
    init: Callable[[jax.Array, Any], Any]
    """`init(key, data) -> world`."""
    batch: Callable[[Any, jax.Array], Batch]
    """`batch(world, step)`, what arrives at a step."""
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    """`loss(outputs, targets)`, what a learner lowers."""
    metric: Callable[[jax.Array, jax.Array], jax.Array]
    """`metric(outputs, targets)`, taken before the step's update."""
    unit: str
    """Of the metric: `%` of right answers (more is better) or `error` (less is better)."""
    task_steps: int
    num_steps: int
    bin_steps: int
    """Steps over which the metric is averaged where it is recorded."""


def labels(
    *,
    num_tasks: int = 60,
    num_images: int = 1200,
    task_steps: int = 200,
) -> Stream:
    """The same images with new random labels every task: what is learned is of no use afterwards.

    Pixels have mean 0 and deviation 1. (With pixels in [0, 1] a network learns so slowly that at
    its best learning rate it loses nothing.)

    Args:
      num_tasks: number of tasks.
      num_images: the first so many training images of Fashion-MNIST.
      task_steps: steps of a task, in batches of 64 different images.

    Returns:
      The stream, for a ReLU network 784-100-100-100-10; metric in %.
    """
    images = jnp.asarray(_flat(load_data("fashion-mnist").train_inputs[:num_images]))
    images = (images - jnp.mean(images)) / jnp.std(images)

    def init(key: jax.Array, data: jax.Array) -> tuple[jax.Array, jax.Array]:
        return key, data

    def batch(world: tuple[jax.Array, jax.Array], step: jax.Array) -> Batch:
        key, inputs = world
        of_task, of_step = _keys(key, step, task_steps)
        classes = jax.random.randint(of_task, (num_images,), 0, 10)
        rows = jax.random.choice(of_step, num_images, (min(64, num_images),), replace=False)
        return inputs[rows], classes[rows]

    return _classes("labels", 100, images, init, batch, num_tasks, task_steps)


def pixels(*, num_tasks: int = 80, task_images: int = 4000) -> Stream:
    """Fashion-MNIST with its pixels in a new random order every task, each batch seen once.

    Args:
      num_tasks: number of tasks.
      task_images: images of a task, drawn from all training images, in batches of 16.

    Returns:
      The stream, for a ReLU network 784-100-100-100-10; metric in %.
    """
    source = load_data("fashion-mnist")
    data = (jnp.asarray(_flat(source.train_inputs)), jnp.asarray(source.train_targets))
    num_images, size = data[0].shape
    task_steps = task_images // 16

    def init(key: jax.Array, data: Any) -> Any:
        return key, data

    def batch(world: Any, step: jax.Array) -> Batch:
        key, (inputs, classes) = world
        of_task, of_step = _keys(key, step, task_steps)
        order = jax.random.permutation(of_task, size)
        rows = jax.random.randint(of_step, (16,), 0, num_images)
        return inputs[rows][:, order], classes[rows]

    return _classes("pixels", 100, data, init, batch, num_tasks, task_steps)


class Target(NamedTuple):
    """A fixed network of linear threshold units (Dohare et al., Nature 632:768, 2024)."""

    weights: jax.Array
    """`[units, m + 1]` of -1 and 1; the last is that of the constant input 1."""
    thresholds: jax.Array
    """`[units]`, `beta (m + 1) - S` with S the number of negative weights of a unit."""
    out: jax.Array
    """`[units + 1]` of -1 and 1; the last is the bias."""


def make_target(
    key: jax.Array, *, num_inputs: int = 20, num_units: int = 100, beta: float = 0.7
) -> Target:
    """Draws a target network.

    A unit fires where `w . (x, 1)` exceeds its threshold, which is where the share of its inputs
    that agree with the signs of their weights (1 with +1, 0 with -1) exceeds `beta`.

    Args:
      key: of the draw.
      num_inputs: m.
      num_units: number of threshold units.
      beta: share of the inputs that must agree.
    """
    first, second = jax.random.split(key)
    weights = jax.random.rademacher(first, (num_units, num_inputs + 1), jnp.float32)
    negative = jnp.sum(weights < 0, axis=1).astype(jnp.float32)
    return Target(
        weights=weights,
        thresholds=beta * (num_inputs + 1) - negative,
        out=jax.random.rademacher(second, (num_units + 1,), jnp.float32),
    )


def target_value(target: Target, inputs: jax.Array) -> jax.Array:
    """Computes the target of inputs `[B, m]` of zeros and ones: `[B, 1]`."""
    constant = jnp.ones((inputs.shape[0], 1), inputs.dtype)
    fires = jnp.concatenate([inputs, constant], axis=1) @ target.weights.T > target.thresholds
    return (fires.astype(inputs.dtype) @ target.out[:-1] + target.out[-1])[:, None]


def regression(
    *, num_steps: int = 1_000_000, task_steps: int = 10_000, bin_steps: int = 2_000
) -> Stream:
    """Slowly changing regression (Dohare et al., Nature 632:768, 2024), an example a step.

    Of 20 input bits 15 are slow: every `task_steps` examples one of them, chosen at random, flips.
    The other five are random in each example. The target is `make_target`'s, of far more units than
    the learner has, so that the best approximation changes with the slow bits.

    Args:
      num_steps: number of examples, a multiple of `bin_steps`.
      task_steps: examples between two flips.
      bin_steps: examples over which the squared error is averaged.

    Returns:
      The stream, for a ReLU network 20-5-1; metric the squared error.
    """
    num_slow, num_fast = 15, 5
    num_tasks = -(-num_steps // task_steps)

    def init(key: jax.Array, data: None) -> Any:
        del data
        keys = jax.random.split(key, 4)
        start = jax.random.randint(keys[0], (num_slow,), 0, 2)
        flips = jax.nn.one_hot(
            jax.random.randint(keys[1], (num_tasks,), 0, num_slow), num_slow, dtype=jnp.int32
        )
        slow = (start + jnp.cumsum(flips, axis=0)) % 2
        return make_target(keys[2]), slow.astype(jnp.float32), keys[3]

    def batch(world: Any, step: jax.Array) -> Batch:
        target, slow, key = world
        fast = jax.random.bernoulli(jax.random.fold_in(key, step), 0.5, (num_fast,))
        inputs = jnp.concatenate([slow[step // task_steps], fast.astype(jnp.float32)])[None]
        return inputs, target_value(target, inputs)

    return Stream(
        name="regression",
        widths=(num_slow + num_fast, 5, 1),
        data=None,
        init=init,
        batch=batch,
        loss=squared_error,
        metric=squared_error,
        unit="error",
        task_steps=task_steps,
        num_steps=num_steps,
        bin_steps=bin_steps,
    )


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the mean squared error."""
    return jnp.mean((outputs - targets) ** 2)


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the mean cross-entropy of logits."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def percent_right(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the share of right answers in %."""
    return 100 * jnp.mean((jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32))


def _classes(
    name: str, width: int, data: Any, init: Any, batch: Any, num_tasks: int, task_steps: int
) -> Stream:
    return Stream(
        name=name,
        widths=(784, width, width, width, 10),
        data=data,
        init=init,
        batch=batch,
        loss=cross_entropy,
        metric=percent_right,
        unit="%",
        task_steps=task_steps,
        num_steps=num_tasks * task_steps,
        bin_steps=max(task_steps // 10, 1),
    )


def _flat(images: Any) -> Any:
    return images.reshape(len(images), -1).astype("float32")


def _keys(key: jax.Array, step: jax.Array, task_steps: int) -> tuple[jax.Array, jax.Array]:
    """Keys of a step's task and of the step."""
    tasks, steps = jax.random.split(key)
    return jax.random.fold_in(tasks, step // task_steps), jax.random.fold_in(steps, step)
