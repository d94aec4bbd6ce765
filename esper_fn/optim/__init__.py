"""Optax transformations for a host and its adapters.

`per_adapter` makes one transformation of the host's and the adapters'. It is an
`optax.GradientTransformationExtraArgs` over the pair `(params, adapters)`, so it nests inside
`optax.chain`, `optax.MultiSteps`, `optax.apply_if_finite` and `optax.inject_hyperparams`;
`plain_gradients` says which of them need it.
"""

from esper_fn.optim._apply import apply_updates
from esper_fn.optim._per_adapter import per_adapter
from esper_fn.optim._records import AdapterGradients, PerAdapterState, Slots, plain_gradients

__all__ = [
    "AdapterGradients",
    "PerAdapterState",
    "Slots",
    "apply_updates",
    "per_adapter",
    "plain_gradients",
]
