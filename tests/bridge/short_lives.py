"""A lifecycle that goes through its stages within a few dozen steps."""

from contextlib import contextmanager

import torch

import esper_fn as ef
from esper_fn.lifecycle import Stage

GROWN = {*range(Stage.GRAFTING, Stage.FOSSILIZED + 1)}


def options():
    """Return arguments for `torch_bridge.grow`, anew for each bridge."""
    return {
        "chunks": 4,
        "blueprints": {"low_rank": ef.blueprints.low_rank(rank=2)},
        "capacity": 3,
        "policy": ef.policies.periodic(every=3),
        "graft": ef.grafting.linear(num_steps=4),
        "settings": ef.lifecycle.settings(
            min_steps={
                Stage.GERMINATED: 0,
                Stage.TRAINING: 2,
                Stage.STABILIZATION: 2,
                Stage.EVALUATING: 2,
                Stage.FINE_TUNING: 2,
            },
            max_steps={Stage.TRAINING: 4, Stage.STABILIZATION: 3},
            utility_variation=1e9,
            loss_variation=1e9,
            min_stability=0.0,
            min_contribution=-1e9,
            min_surveys=1,
        ),
        "verbose": False,
    }


@contextmanager
def one_thread():
    """Take from torch the choice of how many threads add up: sums then have the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def differences(ours, theirs):
    """Name the entries of two state dicts that are not bitwise equal."""
    assert list(ours) == list(theirs)
    return [
        name
        for name, value in ours.items()
        if value.cpu().contiguous().numpy().tobytes()
        != theirs[name].cpu().contiguous().numpy().tobytes()
    ]
