"""Makes the loss and the evaluation of a host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_fn._typing import Array, Params
from esper_fn.demo.hosts import Host

EVAL_ROWS = 256

Evaluate = Callable[[Params, Any], tuple[float, float]]
"""`evaluate(params, seeds)` gives the accuracy and the mean loss."""


def make_loss(host: Host) -> Callable[..., Array]:
    """Makes the mean cross-entropy of a host's logits.

    Args:
      host: the network.

    Returns:
      `loss_fn(params, seeds, (inputs, targets))`, a pure scalar.
    """

    def loss_fn(params: Params, seeds: Any, batch: tuple[Array, Array]) -> Array:
        inputs, targets = batch
        logits = host.apply(params, seeds, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss_fn


def make_evaluate(host: Host, inputs: np.ndarray, targets: np.ndarray) -> Evaluate:
    """Compiles the evaluation of a host on all of `inputs`, in pieces of `EVAL_ROWS` examples.

    Args:
      host: the network.
      inputs: `[N, ...]`.
      targets: `[N]` classes, or `[N, T]` characters.

    Returns:
      `evaluate(params, seeds)`, the accuracy and the mean loss.
    """
    rows = min(EVAL_ROWS, len(inputs))
    pad = -len(inputs) % rows
    order = np.concatenate([np.arange(len(inputs)), np.zeros(pad, np.int64)])
    weight = (np.arange(len(order)) < len(inputs)).astype(np.float32).reshape(-1, rows)
    pieces = (
        jnp.asarray(inputs[order].reshape(-1, rows, *inputs.shape[1:])),
        jnp.asarray(targets[order].reshape(-1, rows, *targets.shape[1:])),
        jnp.asarray(weight),
    )

    @jax.jit
    def evaluate(params: Params, seeds: Any, pieces: Any) -> tuple[Array, Array]:
        def evaluate_piece(piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            inputs, targets, weight = piece
            logits = host.apply(params, seeds, inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            is_right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
            per_example = weight.reshape(-1, *(1,) * (targets.ndim - 1)) / np.prod(
                targets.shape[1:]
            )
            return jnp.sum(is_right * per_example), jnp.sum(losses * per_example)

        hits, losses = jax.lax.map(evaluate_piece, pieces)
        return jnp.sum(hits) / len(inputs), jnp.sum(losses) / len(inputs)

    def run(params: Params, seeds: Any) -> tuple[float, float]:
        accuracy, loss = jax.device_get(evaluate(params, seeds, pieces))
        return float(accuracy), float(loss)

    return run
