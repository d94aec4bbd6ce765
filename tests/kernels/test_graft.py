"""One class that every implementation of `graft` passes, interpreted on a CPU or on a device."""

import numpy as np
import pytest

pytest.importorskip("torch")

from conformance import (
    BY_NAME,
    PAIRS,
    PLAIN,
    SPECIAL,
    WIDE,
    assert_close,
    bits,
    live_chunks,
    references,
)
from implementations import rounded, truth

from esper_kernels.graft._specs import draw


class TestConformance:
    @pytest.mark.parametrize(("spec_name", "dtype"), PAIRS)
    def test_no_further_from_the_truth_than_twice_the_reference(self, run, spec_name, dtype):
        spec = BY_NAME[spec_name]
        inputs = draw(spec)
        outcome, true = run(spec, inputs, dtype), truth(spec, inputs, dtype)
        assert_close(outcome, true, references(spec_name, dtype), dtype)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
    @pytest.mark.parametrize(
        ("gains", "dtype"),
        [
            pytest.param((0, 0, 0, 0), "bfloat16", id="dormant"),
            pytest.param((0, 1, 0, 0), "float32", id="training"),
            pytest.param((0, 1, 0, 2), "bfloat16", id="damped"),
        ],
    )
    def test_identity_bit_for_bit_where_nothing_acts(self, run, name, gains, dtype):
        inputs = draw(PLAIN)
        for array in (inputs.x, inputs.dy):
            array[0, :8] = SPECIAL
        inputs.down[0] = np.nan
        outcome = run(PLAIN, inputs._replace(gains=np.full((3, 4), gains, np.float32)), dtype)
        for ours, before in ((outcome.y, inputs.x), (outcome.dx, inputs.dy)):
            np.testing.assert_array_equal(bits(ours), bits(rounded(name, before, dtype)))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_broken_adapter_reaches_nothing(self, run, clean):
        inputs = draw(PLAIN)
        chunk = 1
        slot = int(inputs.slot[chunk])
        down = inputs.down.copy()
        down[slot, 0, 0] = np.nan
        broken = run(PLAIN, inputs._replace(down=down))
        mine = slice(chunk * WIDE, (chunk + 1) * WIDE)
        others = np.r_[0:WIDE, 2 * WIDE : 3 * WIDE]
        for field in ("y", "dx"):
            ours, before = getattr(broken, field), getattr(clean, field)
            np.testing.assert_array_equal(bits(ours[:, others]), bits(before[:, others]))
        host = truth(PLAIN, inputs._replace(slot=np.full(3, -1, np.int32)), "bfloat16")
        np.testing.assert_array_equal(broken.y[:, mine], host.y[:, mine])
        np.testing.assert_array_equal(broken.dx[:, WIDE], host.dx[:, WIDE])
        assert np.isfinite(broken.dx).all()
        for field in ("down", "up", "bias"):
            ours, before = getattr(broken, field), getattr(clean, field)
            assert not ours[slot].any()
            rest = [p for p in range(3) if p != slot]
            np.testing.assert_array_equal(bits(ours[rest]), bits(before[rest]))
        assert broken.channels[chunk, 1:].tolist() == [1, 0, 0, 1]
        np.testing.assert_array_equal(broken.channels[[0, 2]], clean.channels[[0, 2]])

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_outputs_that_are_not_finite_are_left_out_entry_by_entry(self, run, clean):
        inputs = draw(PLAIN)
        chunk, slot = 1, int(inputs.slot[1])
        up = inputs.up.copy()
        up[slot, :, 0] = np.nan
        broken = run(PLAIN, inputs._replace(up=up))
        host = truth(PLAIN, inputs._replace(slot=np.full(3, -1, np.int32)), "bfloat16")
        first = chunk * WIDE
        rest = np.delete(np.arange(3 * WIDE), first)
        np.testing.assert_array_equal(broken.y[:, first], host.y[:, first])
        np.testing.assert_array_equal(bits(broken.y[:, rest]), bits(clean.y[:, rest]))
        mine = slice(first, first + WIDE)
        np.testing.assert_array_equal(broken.dx[:, mine], host.dx[:, mine])
        for field in ("down", "up", "bias"):
            assert not getattr(broken, field)[slot].any()
        assert broken.channels[chunk, 1:].tolist() == [1, 0, 0, 1]

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_broken_input_stays_in_its_chunk_and_is_no_error_of_the_adapter(
        self, run, clean, value
    ):
        inputs = draw(PLAIN)
        x = inputs.x.copy()
        x[5, WIDE + 8] = value
        broken = run(PLAIN, inputs._replace(x=x))
        others = np.r_[0:WIDE, 2 * WIDE : 3 * WIDE]
        np.testing.assert_array_equal(bits(broken.y[:, others]), bits(clean.y[:, others]))
        np.testing.assert_array_equal(bits(broken.dx[:, others]), bits(clean.dx[:, others]))
        rows = np.r_[0:5, 6:72]
        np.testing.assert_array_equal(bits(broken.y[rows]), bits(clean.y[rows]))
        assert not broken.channels[:, 4].any()
        np.testing.assert_array_equal(broken.channels[[0, 2]], clean.channels[[0, 2]])

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_overflowing_adapter_is_an_error(self, run):
        inputs = draw(PLAIN)
        up = np.full_like(inputs.up, 3e38)
        outcome = run(PLAIN, inputs._replace(up=up))
        assert outcome.channels[:, 4].all()
        assert np.isfinite(outcome.y).all()
        assert not outcome.down.any()

    def test_same_bits_every_time(self, run, clean):
        for first, second in zip(clean, run(PLAIN, draw(PLAIN)), strict=True):
            assert first is second or np.array_equal(bits(first), bits(second))

    def test_dead_features_are_counted(self, run):
        inputs = draw(PLAIN)
        inputs.x[:, [0, 1, 3 * WIDE - 1]] = 0
        inputs.x[:-1, WIDE + 8] = 0
        assert run(PLAIN, inputs).watched[:, 4].tolist() == [2, 0, 1]

    def test_slots_beyond_the_bank_serve_nobody(self, run):
        inputs = draw(PLAIN)
        outcome = run(PLAIN, inputs._replace(slot=np.array([3, -7, 1], np.int32)))
        assert outcome.channels[:, 1].tolist() == [0, 0, 1]
        assert not outcome.down[[0, 2]].any()

    def test_learn_scales_the_adapter_and_feel_the_input(self, run):
        inputs = draw(PLAIN)
        full = inputs._replace(gains=np.tile(np.float32([1, 1, 1, 0]), (3, 1)))
        half = full._replace(gains=np.tile(np.float32([1, 0.5, 1, 0]), (3, 1)))
        unfelt = full._replace(gains=np.tile(np.float32([1, 1, 0, 0]), (3, 1)))
        whole = run(PLAIN, full)
        np.testing.assert_array_equal(2 * run(PLAIN, half).down, whole.down)
        without = run(PLAIN, unfelt)
        np.testing.assert_array_equal(without.down, whole.down)
        assert not np.array_equal(without.dx, whole.dx)

    @pytest.mark.parametrize(("spec_name", "dtype"), PAIRS)
    def test_in_place_is_the_same_and_measures_live_chunks_only(
        self, run_in_place, spec_name, dtype
    ):
        spec = BY_NAME[spec_name]
        inputs = draw(spec)
        outcome, true = run_in_place(spec, inputs, dtype), truth(spec, inputs, dtype)
        dormant = ~live_chunks(spec, inputs)

        def masked(results):
            rows = {"watched": results.watched.copy(), "channels": results.channels.copy()}
            for measured in rows.values():
                measured[dormant] = 0
            return results._replace(**rows)

        assert not outcome.watched[dormant].any()
        assert not outcome.channels[dormant].any()
        assert_close(
            outcome, masked(true), [masked(usual) for usual in references(spec_name, dtype)], dtype
        )

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_in_place_leaves_what_does_not_act_bit_for_bit(self, run_in_place, name):
        inputs = draw(PLAIN)
        for array in (inputs.x, inputs.dy):
            for chunk in range(3):
                array[0, WIDE * chunk : WIDE * chunk + 8] = SPECIAL
        inputs.gains[0] = 0
        inputs.gains[1] = [0, 1, 0, 0]
        outcome = run_in_place(PLAIN, inputs)
        for ours, before in ((outcome.y, inputs.x), (outcome.dx, inputs.dy)):
            if ours is not None:
                right = rounded(name, before, "bfloat16")
                np.testing.assert_array_equal(bits(ours[:, : 2 * WIDE]), bits(right[:, : 2 * WIDE]))
        assert outcome.watched[:, 0].tolist() == [0, 72 * WIDE, 72 * WIDE]

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_in_place_tells_broken_adapters_from_broken_input(self, run_in_place):
        inputs = draw(PLAIN)
        inputs.x[5, WIDE + 8] = np.inf
        inputs.down[inputs.slot[2]] = np.nan
        outcome = run_in_place(PLAIN, inputs)
        assert np.isfinite(outcome.y[:, :WIDE]).all()
        assert np.isfinite(outcome.y[:, 2 * WIDE :]).all()
        if outcome.channels is not None:
            assert outcome.channels[:, 4].tolist() == [0, 0, 1]
            assert not outcome.down[inputs.slot[2]].any()
            assert outcome.down[inputs.slot[0]].any()

    def test_in_place_same_bits_every_time(self, run_in_place):
        inputs = draw(PLAIN)
        pairs = zip(run_in_place(PLAIN, inputs), run_in_place(PLAIN, inputs), strict=True)
        for first, second in pairs:
            assert first is second or np.array_equal(bits(first), bits(second))
