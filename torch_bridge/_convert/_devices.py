"""JAX's CPU device, without JAX taking memory on torch's GPU."""

from __future__ import annotations

import jax
from jax._src import xla_bridge  # tells whether JAX has started; no public function does


def cpu_device() -> jax.Device:
    """Return JAX's CPU device; if JAX has not started yet, start it on the CPU alone.

    JAX starts every platform it finds when it is first asked for a device, and on a GPU it then
    reserves most of the memory, which belongs to torch here. So where nobody has chosen platforms
    (`JAX_PLATFORMS`, `jax.config.jax_platforms`) and JAX has not started, this chooses `cpu`.
    To have JAX on the GPU too, choose before: `JAX_PLATFORMS=cuda,cpu`, or touch JAX first.

    Raises:
      RuntimeError: by JAX, if the platforms that were chosen leave out `cpu`.
    """
    if not xla_bridge.backends_are_initialized() and not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")
    return jax.local_devices(backend="cpu")[0]
