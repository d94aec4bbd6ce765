"""What the tests of every implementation of `graft` share: specs, comparisons, runners."""

from functools import cache

import numpy as np
import pytest
from implementations import DEVICE, DTYPES, RUNNERS, Outcome, refusal

from esper_kernels.graft._specs import SPECS, Spec, draw

BY_NAME = {spec.name: spec for spec in SPECS}
IN_BOTH_DTYPES = ("low_rank", "odd", "gated_remainder", "one_row")
FLOORS = {"bfloat16": 2.0**-9, "float32": 4e-6}
WIDE = 64
"""As Pallas takes chunks."""
PLAIN = Spec(name="plain", rows=72, features=3 * WIDE, chunks=3, slots=3, rank=8, activation="relu")
SPECIAL = (np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3e38, -3e38)


def _pairs():
    """Specs and dtypes: all on a device; interpreted, every spec and both dtypes, not all pairs."""
    for index, spec in enumerate(SPECS):
        if DEVICE != "cpu" or spec.name in IN_BOTH_DTYPES:
            yield from ((spec.name, dtype) for dtype in DTYPES)
        elif spec.is_small:
            yield spec.name, DTYPES[index % 2]


PAIRS = list(_pairs())


def bits(array):
    """The float64 image of values, NaN and the sign of zero told apart."""
    return np.ascontiguousarray(array).view(np.int64)


def error(ours, true):
    """Size of the difference over the size of the truth."""
    scale = np.linalg.norm(true)
    return np.linalg.norm(ours - true) / scale if scale else np.linalg.norm(ours)


@cache
def references(spec_name, dtype):
    """What the references make of a spec: the error that is usual in its dtype."""
    spec = BY_NAME[spec_name]
    names = ("torch-reference", "jax-reference")
    return [RUNNERS[name](spec, draw(spec), dtype) for name in names]


def live_chunks(spec, inputs):
    """[C]: chunks that have an adapter at work."""
    has_slot = (inputs.slot >= 0) & (inputs.slot < spec.slots)
    return has_slot & inputs.gains.any(axis=1)


def assert_close(outcome, true, usual, dtype):
    """Every result that an implementation has is within twice the error of the references."""
    for field in Outcome._fields:
        ours, right = getattr(outcome, field), getattr(true, field)
        if right is None:
            assert ours is None
            continue
        assert ours.shape == right.shape
        columns = range(5) if field in {"watched", "channels"} else [...]
        for k in columns:
            pick = (slice(None), k) if k is not ... else ...
            # A sum over rows may be lucky in the reference: one rounding of a term is granted.
            floor = FLOORS[dtype] if field in {"bias", "channels"} else 4e-6
            worst = max(error(getattr(other, field)[pick], right[pick]) for other in usual)
            allowed = 2 * worst + floor
            assert error(ours[pick], right[pick]) <= allowed, (field, k)


def runner(runners, name):
    """`run(spec, inputs, dtype)` of an implementation, which skips what it refuses."""

    def run(spec, inputs, dtype="bfloat16"):
        reason = refusal(name, spec, dtype)
        if reason is not None:
            pytest.skip(reason)
        return runners[name](spec, inputs, dtype)

    return run
