"""`graft` for JAX: forward and backward as plain functions, and joined by a custom derivative."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_kernels._dispatch import Choice, choose
from esper_kernels._errors import ArgumentError
from esper_kernels._jax_device import device_name
from esper_kernels._records import Adapter
from esper_kernels.graft import reference_jax
from esper_kernels.graft._case import Case, check

Array = jax.Array
_PALLAS = "esper_kernels.graft.pallas_mosaic_gpu"


def explain(
    x: Any,
    adapter: Adapter,
    slot: Any,
    gains: Any,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> Choice:
    """Tell what `graft` would run for these arguments, and why nothing better.

    The arguments are those of `graft`; for arrays, their `jax.ShapeDtypeStruct` will do.

    Raises:
      ArgumentError: the arguments do not fit together.
      UnavailableError: `implementation` cannot serve them; says why.
    """
    case = check(x, adapter, slot, gains, activation=activation, device=device_name(x))
    return _choose(case, implementation)


def forward(
    x: Array,
    adapter: Adapter,
    slot: Array,
    gains: Array,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Return `y [N, D]` and `watched [C, 5]`, for callers with a derivative rule of their own.

    Arguments and errors as for `graft`.
    """
    case = check(x, adapter, slot, gains, activation=activation, device=device_name(x))
    y, watched = _backend(case, implementation).forward(case, x, adapter, slot, gains)
    return y, watched


def forward_in_place(
    x: Array,
    adapter: Adapter,
    slot: Array,
    gains: Array,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Do the same into the memory of `x` where XLA can reuse it, `watched` for live chunks only.

    Not differentiable. Under `jit`, donate `x` or let this be its last use; else XLA copies it.
    """
    case = check(x, adapter, slot, gains, activation=activation, device=device_name(x))
    y, watched = _backend(case, implementation).forward_in_place(case, x, adapter, slot, gains)
    return y, watched


def backward(
    x: Array,
    dy: Array,
    adapter: Adapter,
    slot: Array,
    gains: Array,
    watched: Array,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> tuple[Array, Adapter, Array]:
    """Return `dx [N, D]`, the adapter's gradients and `channels [C, 5]`.

    Args:
      x: what `forward` took, and so are `adapter`, `slot`, `gains` and the options.
      dy: [N, D], the gradient of its `y`.
      adapter: see `graft`.
      slot: see `graft`.
      gains: see `graft`.
      watched: [C, 5], what `forward` returned.
      activation: see `graft`.
      implementation: see `graft`.

    Raises:
      ArgumentError: `dy` is not as `x`; else as for `graft`.
    """
    case = _check(x, dy, adapter, slot, gains, activation)
    backend = _backend(case, implementation)
    dx, d_adapter, channels = backend.backward(case, x, dy, adapter, slot, gains, watched)
    return dx, d_adapter, channels


def backward_in_place(
    x: Array,
    dy: Array,
    adapter: Adapter,
    slot: Array,
    gains: Array,
    watched: Array,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> tuple[Array, Adapter, Array]:
    """Do what `backward` does into the memory of `dy` where XLA can reuse it, for live chunks.

    Takes what `backward` takes. `watched` may come from `forward` or from `forward_in_place` of
    this `x`: only its rows of live chunks are read, to tell an adapter that breaks from input that
    was broken before. Under `jit`, donate `dy` or let this be its last use; else XLA copies it.

    Returns:
      dx: [N, D], `dy` untouched in dormant chunks.
      d_adapter: as `backward` gives it.
      channels: [C, 5], as `backward` gives it in live chunks; zero rows, not measured, elsewhere,
        `gradient_square` too.

    Raises:
      ArgumentError: `dy` is not as `x`; else as for `graft`.
    """
    case = _check(x, dy, adapter, slot, gains, activation)
    backend = _backend(case, implementation)
    dx, d_adapter, channels = backend.backward_in_place(case, x, dy, adapter, slot, gains, watched)
    return dx, d_adapter, channels


def _check(x: Any, dy: Any, adapter: Adapter, slot: Any, gains: Any, activation: str) -> Case:
    case = check(x, adapter, slot, gains, activation=activation, device=device_name(x))
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ArgumentError(f"dy is {dy.shape} {dy.dtype}; it must be as x: {x.shape} {x.dtype}")
    return case


def graft(
    x: Array,
    adapter: Adapter,
    slot: Array,
    gains: Array,
    tap: Array | None = None,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Return `y = x + output_scale * adapter(x)` in the live chunks, and statistics of `x`.

    `y` can be differentiated in reverse. The README beside this file has the mathematics and
    defines `watched` and `channels`, the statistics of both passes.

    Args:
      x: [N, D], bfloat16 or float32.
      adapter: matrices of P slots.
      slot: [C] int32, the slot that serves each chunk, -1 for none.
      gains: [C, 4] float32, the columns of `Gains`.
      tap: [C, 5] float32 zeros, or None; `channels` arrive as its cotangent.
      activation: `none`, `relu`, `gelu`, `silu` or `gated`.
      implementation: `auto`, `pallas` or `reference`.

    Returns:
      y: [N, D].
      watched: [C, 5] float32, without a derivative.

    Raises:
      ArgumentError: a dtype, rank or size is wrong; names which. While tracing.
      UnavailableError: `implementation` cannot serve the call; says why. While tracing.

    >>> adapter = Adapter(down=jnp.ones((1, 2, 1)), up=jnp.ones((1, 1, 2)))
    >>> y, _ = graft(jnp.ones((2, 4)), adapter, jnp.array([-1, 0], jnp.int32), jnp.ones((2, 4)))
    >>> y[0].tolist()
    [1.0, 1.0, 3.0, 3.0]
    """
    case = check(x, adapter, slot, gains, activation=activation, device=device_name(x))
    if tap is None:
        tap = jnp.zeros((case.chunks, 5), jnp.float32)
    choice = _choose(case, implementation).implementation
    y, watched = _graft((case, choice), x, adapter, slot, gains, tap)
    return y, watched


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _graft(
    static: tuple[Case, str], x: Array, adapter: Adapter, slot: Array, gains: Array, tap: Array
) -> tuple[Array, Array]:
    del tap
    y, watched = _module(static[1]).forward(static[0], x, adapter, slot, gains)
    return y, watched


def _fwd(
    static: tuple[Case, str], x: Array, adapter: Adapter, slot: Array, gains: Array, tap: Array
) -> Any:
    y, watched = _graft(static, x, adapter, slot, gains, tap)
    return (y, watched), (x, adapter, slot, gains, watched)


def _bwd(static: tuple[Case, str], residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    x, adapter, slot, gains, watched = residuals
    dx, d_adapter, channels = _module(static[1]).backward(
        static[0], x, cotangents[0], adapter, slot, gains, watched
    )
    no_slot = np.zeros(slot.shape, jax.dtypes.float0)
    return dx, d_adapter, no_slot, jnp.zeros_like(gains), channels


_graft.defvjp(_fwd, _bwd)


def _refuses_pallas(case: Case) -> str | None:
    try:
        module = importlib.import_module(_PALLAS)
    except ImportError as error:
        return f"{_PALLAS} cannot be imported ({error})"
    refusal: str | None = module.refuses(case)
    return refusal


def _choose(case: Case, implementation: str) -> Choice:
    candidates = {"pallas": _refuses_pallas(case), "reference": reference_jax.refuses(case)}
    return choose("graft", implementation, candidates, framework="jax")


def _module(name: str) -> Any:
    return importlib.import_module(_PALLAS) if name == "pallas" else reference_jax


def _backend(case: Case, implementation: str) -> Any:
    return _module(_choose(case, implementation).implementation)
