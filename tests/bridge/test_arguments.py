"""Wrong arguments of `step` and `survey` are named, with what to pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bridges import Mlp, grow, set_stages

import esper_fn as ef
from esper_fn.lifecycle import Stage
from torch_bridge import BridgeError

CULL = ef.commands.cull(0)


@pytest.fixture(scope="module")
def bridge() -> Any:
    return grow(Mlp(), "fc1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4),), r"one number, got a tensor of shape \(4,\); pass the mean"),
        (([CULL], torch.tensor(1.0)), r"loss must be .*got a list; call bridge.step\(loss, \["),
        ((None,), "loss must be .*got a NoneType"),
        ((True,), "loss must be .*got a bool"),
        (("1.0",), "loss must be .*got '1.0'"),
        ((1.0, CULL), r"got one; pass \[command\]"),
        ((1.0, "cull"), "commands must be a list of commands, got 'cull'"),
        ((1.0, ["cull"]), "commands must hold .*got 'cull'"),
        ((1.0, None), "commands must be a list of commands, got a NoneType"),
    ],
)
def test_step(bridge: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        bridge.step(*arguments)
    assert int(bridge.state.step) == 0


@pytest.mark.parametrize("closure", [torch.tensor(1.0), 1.0, None])
def test_survey(bridge: Any, closure: Any) -> None:
    with pytest.raises(BridgeError, match="closure must be a function without arguments"):
        bridge.survey(closure)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_held_out_batch_that_is_not_finite_is_named_and_measures_nothing(bad: float) -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    set_stages(bridge, {0: ("low_rank", Stage.EVALUATING, 1.0)})
    x = torch.randn(5, 6)
    x[2, 1] = bad
    with pytest.warns(RuntimeWarning, match="held-out loss is nan"):
        info = bridge.survey(lambda: model(x).square().mean())
    assert not np.isfinite(info.loss)
    seeds = bridge.state.seeds
    assert not np.asarray(seeds.error_count).any()
    assert not np.asarray(seeds.num_potentials).any()
    assert not np.asarray(seeds.num_contributions).any()
