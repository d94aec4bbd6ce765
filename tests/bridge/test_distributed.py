"""Two processes over gloo decide the same, and as one process on the whole batch does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from short_lives import GROWN

from esper_fn.lifecycle import Stage

HERE = Path(__file__).parent


def test_two_ranks_decide_the_same_and_as_one_process_does(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "ranks.py"),
                *(str(rank), str(world), str(tmp_path / "store"), str(tmp_path / f"of{world}_")),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]
    for run in runs:
        _, options = run.communicate(timeout=300)
        assert run.returncode == 0, options
    first, second, alone = (
        np.load(tmp_path / f"of{world}_{rank}.npz") for rank, world in ((0, 2), (1, 2), (0, 1))
    )
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    np.testing.assert_array_equal(first["stages"], alone["stages"])
    assert set(np.unique(first["stages"])) >= set(range(Stage.FINE_TUNING + 1))
    np.testing.assert_allclose(first["utility"], alone["utility"], rtol=5e-2, atol=1e-5)
    np.testing.assert_allclose(first["potential"], alone["potential"], rtol=5e-2, atol=1e-3)
    # Not the adapters: singular values that nearly tie may bear their units in another order.
    np.testing.assert_allclose(first["outputs"], alone["outputs"], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_two_ranks_under_a_trainer_decide_the_same(framework: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "HF_HUB_OFFLINE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "ours",  # by which trainers know who started them
    }
    runs = [
        subprocess.Popen(
            [sys.executable, str(HERE / "callback_ranks.py"), framework, str(tmp_path)],
            env=os.environ | options | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for run in runs:
        _, error = run.communicate(timeout=300)
        assert run.returncode == 0, error
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    assert len(first["stages"]) == 20
    assert GROWN & {Stage(stage) for stage in np.unique(first["stages"]).tolist()}
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
