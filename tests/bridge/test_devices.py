"""JAX is started on the CPU alone, unless it has started before."""

import os
import subprocess
import sys

import pytest

USES = {
    "conversion": "torch_bridge.tree_to_jax(torch.ones(2))",
    "grow": "torch_bridge.grow(torch.nn.Sequential(torch.nn.Linear(4, 8)), targets='0', chunks=2)",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("has_started", [False, True])
def test_platforms_are_chosen_before_jax_starts_and_never_after(use, has_started):
    environment = {name: item for name, item in os.environ.items() if name != "JAX_PLATFORMS"}
    code = "import jax, torch, torch_bridge\n"
    if has_started:
        code += "jax.devices()\n"
    code += f"{USES[use]}\nprint(repr(jax.config.jax_platforms))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == repr(None if has_started else "cpu")
