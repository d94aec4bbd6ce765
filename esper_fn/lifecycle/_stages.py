"""The eleven stages, which of them may follow which, and how each one acts."""

from __future__ import annotations

from enum import IntEnum
from numbers import Integral
from types import MappingProxyType

import numpy as np

from esper_fn._records import record
from esper_fn.errors import UnknownNameError


@record
class Stage(IntEnum):
    """Where a seed is in its life."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10


NUM_STAGES = len(Stage)


def as_stage(value: object, argument: str) -> Stage:
    """A `Stage`; raises `UnknownNameError` for what is none, its name as a string for instance."""
    if isinstance(value, Integral) and not isinstance(value, bool) and value in set(Stage):
        return Stage(int(value))
    remedy = "write a member of `ef.Stage`"
    if isinstance(value, str) and value.upper() in Stage.__members__:
        remedy = f"write `ef.Stage.{value.upper()}`, not its name"
    raise UnknownNameError(f"stage in {argument}:", value, Stage.__members__, remedy)


SUCCESSORS = MappingProxyType(
    {
        Stage.DORMANT: (Stage.GERMINATED,),
        Stage.GERMINATED: (Stage.TRAINING, Stage.GRAFTING, Stage.CANCELLED),
        Stage.TRAINING: (Stage.GRAFTING, Stage.CULLED, Stage.CANCELLED, Stage.ROLLED_BACK),
        Stage.GRAFTING: (Stage.STABILIZATION, Stage.CULLED, Stage.ROLLED_BACK),
        Stage.STABILIZATION: (Stage.EVALUATING, Stage.ROLLED_BACK),
        Stage.EVALUATING: (Stage.FINE_TUNING, Stage.CULLED, Stage.ROLLED_BACK),
        Stage.FINE_TUNING: (Stage.FOSSILIZED, Stage.CULLED, Stage.ROLLED_BACK),
        Stage.FOSSILIZED: (Stage.DORMANT,),
        Stage.CULLED: (Stage.DORMANT,),
        Stage.CANCELLED: (Stage.DORMANT,),
        Stage.ROLLED_BACK: (Stage.DORMANT,),
    }
)
"""The one table of legal transitions; `TRANSITIONS` is the same as a matrix."""


def _matrix() -> np.ndarray:
    legal = np.zeros((NUM_STAGES, NUM_STAGES), bool)
    for source, targets in SUCCESSORS.items():
        legal[source, list(targets)] = True
    legal.setflags(write=False)
    return legal


TRANSITIONS = _matrix()
"""bool[11, 11]: `TRANSITIONS[source, target]`; no stage may follow itself."""

# (output_scale, param_grad_scale, input_grad_scale) of a stage; "a" stands for the seed's alpha.
# Where an adapter acts, the host's gradient is scaled as much: it is that of what it computes.
_GAINS: dict[Stage, tuple[int | str, int | str, int | str]] = {
    Stage.DORMANT: (0, 0, 0),
    Stage.GERMINATED: (0, 0, 0),
    Stage.TRAINING: (0, 1, 0),
    Stage.GRAFTING: ("a", 1, "a"),
    Stage.STABILIZATION: ("a", 1, "a"),
    Stage.EVALUATING: ("a", 1, "a"),
    Stage.FINE_TUNING: ("a", 1, "a"),
    Stage.FOSSILIZED: ("a", 1, "a"),
    Stage.CULLED: (0, 0, 0),
    Stage.CANCELLED: (0, 0, 0),
    Stage.ROLLED_BACK: (0, 0, 0),
}


def _gain_tables() -> tuple[np.ndarray, np.ndarray]:
    constant = np.zeros((NUM_STAGES, 3), np.float32)
    of_alpha = np.zeros((NUM_STAGES, 3), np.float32)
    for stage, row in _GAINS.items():
        for column, gain in enumerate(row):
            if gain == "a":
                of_alpha[stage, column] = 1.0
            else:
                constant[stage, column] = gain
    constant.setflags(write=False)
    of_alpha.setflags(write=False)
    return constant, of_alpha


GAIN_CONSTANT, GAIN_OF_ALPHA = _gain_tables()
"""float[11, 3] each: the gains of a stage are `GAIN_CONSTANT + GAIN_OF_ALPHA * alpha`."""

OWNS_ADAPTER = np.isin(np.arange(NUM_STAGES), np.arange(Stage.GERMINATED, Stage.FOSSILIZED + 1))
"""bool[11]: stages whose seeds hold a slot of a bank."""
ON_ITS_WAY = OWNS_ADAPTER & (np.arange(NUM_STAGES) != Stage.FOSSILIZED)
"""bool[11]: stages whose adapter is not decided yet; each of them has a longest stay."""
ACTS = GAIN_OF_ALPHA[:, 0] > 0
"""bool[11]: stages whose adapter changes the host's output."""
ENDS_WITH_EMBARGO = np.isin(np.arange(NUM_STAGES), (Stage.CULLED, Stage.CANCELLED))
"""bool[11]: stages that return to DORMANT by themselves once the embargo is over."""
