"""Where a call for JAX will run."""

from __future__ import annotations

from typing import Any

import jax


def device_name(x: Any) -> str:
    """Return `cpu`, or an accelerator's name such as `NVIDIA H200`.

    Args:
      x: an array says so itself; a tracer or a `jax.ShapeDtypeStruct` runs on the default device,
        that of `jax.default_device` if there is one.

    >>> with jax.default_device(jax.devices("cpu")[0]):
    ...     device_name(jax.ShapeDtypeStruct((2, 3), "float32"))
    'cpu'
    """
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        device = next(iter(x.devices()))
    else:
        config: Any = jax.config
        default = config.jax_default_device
        if default is None or isinstance(default, str):
            default = jax.devices(default)[0]
        device = default
    return "cpu" if device.platform == "cpu" else str(device.device_kind)
