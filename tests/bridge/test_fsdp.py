"""FSDP2 on two processes: the host is sharded, and it grows as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from short_lives import GROWN, options  # noqa: E402
from torch import nn  # noqa: E402

import torch_bridge  # noqa: E402

HERE = Path(__file__).parent


def test_a_sharded_host_grows_as_a_whole_one_does(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    worlds = ((0, 2), (1, 2), (0, 1))
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "sharded_ranks.py"),
                *(str(rank), str(world), str(tmp_path / "store"), str(tmp_path / f"of{world}_")),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in worlds
    ]
    for run in runs:
        _, settings_ = run.communicate(timeout=300)
        assert run.returncode == 0, settings_
    first, second, alone = (np.load(tmp_path / f"of{w}_{r}.npz") for r, w in worlds)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    np.testing.assert_array_equal(first["stages"], alone["stages"])
    assert GROWN & set(np.unique(first["stages"]))
    np.testing.assert_allclose(first["weight"], alone["weight"], rtol=5e-2, atol=1e-3)
    np.testing.assert_allclose(first["adapters"], alone["adapters"], rtol=5e-2, atol=1e-3)


def test_without_a_process_group_it_says_so():
    bridge = torch_bridge.grow(nn.Sequential(nn.Linear(4, 8)), targets="0", **options())
    with pytest.raises(torch_bridge.BridgeError, match="init_process_group"):
        torch_bridge.replicate_adapters(bridge)
