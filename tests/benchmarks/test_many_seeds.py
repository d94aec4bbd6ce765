"""A hundred thousand seeds in the main loop."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import _many_seeds


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*exactly zero")  # some of so many chunks are dead
def test_a_hundred_thousand_seeds_grow_in_the_main_loop() -> None:
    seeds, _, fitted = _many_seeds.run(12)
    assert seeds >= 100_000
    assert np.isfinite(fitted.losses).all()
    assert fitted.num_compiled == 0
    assert {event["to"] for event in fitted.events} >= {"GERMINATED", "GRAFTING"}
