"""Figures: their statistics by hand, and the order in which they are taken."""

import doctest
import gc

import pytest

import benchmarks
from benchmarks import Row, _timing, exact, ratio, summarise, time_interleaved


def test_public_names() -> None:
    assert benchmarks.__all__ == ["Row", "exact", "ratio", "summarise", "time_interleaved"]


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(_timing)
    assert (result.attempted, result.failed) == (3, 0)


class TestTimeInterleaved:
    def test_turns_rotate_and_warmup_is_not_counted(self) -> None:
        calls: list[str] = []
        functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
        samples = time_interleaved(functions, repeats=4, warmup=1)
        turns = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
        assert turns == ["cab", "abc", "bca", "cab", "abc"]
        assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4, "c": 4}

    def test_a_sample_is_the_mean_of_its_inner_calls(self) -> None:
        now = [0.0]

        def spend(seconds: float) -> None:
            now[0] += seconds

        samples = time_interleaved(
            {"fast": lambda: spend(1.0), "slow": lambda: spend(3.0)},
            repeats=2,
            warmup=0,
            inner=5,
            clock=lambda: now[0],
        )
        assert samples == {"fast": [1.0, 1.0], "slow": [3.0, 3.0]}

    def test_drift_cancels_in_the_ratio(self) -> None:
        now, speed = [0.0], [1.0]

        def spend(seconds: float) -> None:
            now[0] += seconds * speed[0]
            speed[0] *= 1.01

        samples = time_interleaved(
            {"ours": lambda: spend(2.0), "rival": lambda: spend(1.0)},
            repeats=100,
            warmup=0,
            clock=lambda: now[0],
        )
        assert ratio(samples["ours"], samples["rival"]).median == pytest.approx(2, rel=0.011)
        assert samples["ours"][-1] > 5 * samples["ours"][0]

    def test_the_collector_pauses_and_comes_back(self) -> None:
        def fail() -> None:
            assert not gc.isenabled()
            raise KeyError("planted")

        assert gc.isenabled()
        with pytest.raises(KeyError, match="planted"):
            time_interleaved({"only": fail}, repeats=1, warmup=0)
        assert gc.isenabled()

    @pytest.mark.parametrize(
        "changed", [{"functions": {}}, {"repeats": 0}, {"warmup": -1}, {"inner": 0}]
    )
    def test_refuses_numbers_out_of_bounds(self, changed: dict[str, object]) -> None:
        sound = {"functions": {"a": lambda: None}, "repeats": 1, "warmup": 0}
        with pytest.raises(ValueError, match="must not be empty, repeats="):
            time_interleaved(**{**sound, **changed})


class TestRows:
    @pytest.mark.parametrize(
        ("unit", "factor"),
        [("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9), ("bytes", 1), ("ratio", 1)],
    )
    def test_seconds_become_the_unit_of_time(self, unit: str, factor: float) -> None:
        row = summarise([4.0, 1.0, 3.0, 2.0, 5.0], unit, shape=[3])
        assert row.median == pytest.approx(3 * factor)
        assert (row.low, row.high) == pytest.approx((2 * factor, 4 * factor))
        assert (row.unit, row.count, row.extra) == (unit, 5, {"shape": [3]})

    def test_ratio_is_of_pairs(self) -> None:
        # The ratio of the medians would be 1; the pairs say otherwise.
        row = ratio([1.0, 2.0, 30.0], [2.0, 1.0, 10.0], rival="bare")
        assert (row.low, row.median, row.high) == (1.25, 2.0, 2.5)
        assert (row.unit, row.count, row.extra) == ("ratio", 3, {"rival": "bare"})

    def test_exact_has_no_spread(self) -> None:
        assert exact(96, "bytes") == Row(median=96, low=96, high=96, unit="bytes", count=1)

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"median": float("nan")}, "must be finite"),
            ({"high": float("inf")}, "must be finite"),
            ({"low": 3.0}, "in this order"),
            ({"count": 0}, "count=0"),
            ({"unit": ""}, "unit=''"),
            ({"extra": {"median": 1, "shape": 2}}, "extra may not hold median"),
        ],
    )
    def test_refuses_what_is_no_figure(self, changed: dict[str, object], reason: str) -> None:
        sound = {"median": 2.0, "low": 1.0, "high": 2.5, "unit": "ms", "count": 3}
        with pytest.raises(ValueError, match=reason):
            Row(**{**sound, **changed})

    @pytest.mark.parametrize(
        ("samples_a", "samples_b", "reason"),
        [
            ([1.0], [1.0, 2.0], "1 samples do not pair with 2"),
            ([1.0], [0.0], "must be positive"),
            ([], [], "at least one figure"),
            ([float("nan")], [1.0], "must be finite"),
        ],
    )
    def test_ratio_refuses_what_does_not_pair(
        self, samples_a: list[float], samples_b: list[float], reason: str
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            ratio(samples_a, samples_b)
