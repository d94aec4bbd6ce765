import itertools
import sys
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from synthetic_run import synthetic

from esper_fn import report
from esper_fn.lifecycle import Stage
from esper_fn.report import figures
from esper_fn.report._format import points, points_tick, short_names
from esper_fn.report._series import curves, histories, ramps, smooth
from esper_fn.report._style import spread
from esper_fn.report._words import STAGES

ALWAYS: list[Callable[[report.Run], Figure]] = [
    figures.stage_map,
    figures.alpha_curves,
    figures.loss_curves,
    figures.accuracy_curves,
    figures.parameters_over_time,
    figures.baseline_bars,
]


def words(figure: Figure) -> list[str]:
    texts = figure.findobj(mpl.text.Text)
    return [text.get_text() for text in texts if text.get_text()]


def lines(figure: Figure, *, label: str) -> list[Any]:
    return [line for axes in figure.axes for line in axes.lines if line.get_label() == label]


def test_stages_are_those_of_the_lifecycle() -> None:
    assert tuple(STAGES) == tuple(stage.name for stage in Stage)


@pytest.mark.parametrize("draw", ALWAYS)
def test_every_figure_is_drawn_without_pyplot_and_leaves_settings_alone(
    draw: Callable[[report.Run], Figure], run: report.Run
) -> None:
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "black"}):
        before = dict(mpl.rcParams)
        figure = draw(run)
        assert dict(mpl.rcParams) == before
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_facecolor()[3] == 0
    figure.canvas.draw()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("draw", ALWAYS)
def test_a_bare_run_says_what_is_missing(
    draw: Callable[[report.Run], Figure], bare_run: report.Run
) -> None:
    figure = draw(bare_run)
    assert not figure.axes
    assert len(words(figure)) == 2


def test_stage_map_has_one_bar_for_each_stay(run: report.Run) -> None:
    figure = figures.stage_map(run)
    bars = {
        c.get_label(): len(c.get_paths())
        for c in figure.axes[0].collections
        if isinstance(c, PolyCollection)
    }
    expected: dict[str, int] = {}
    for history in histories(run, "grown"):
        for stay in history.stays:
            expected[stay.stage] = expected.get(stay.stage, 0) + 1
    assert bars == expected
    assert set(bars) == set(STAGES)
    assert {"encoder", "hidden.0", "hidden.1", "head", "#0", "#23"} <= set(words(figure))
    assert "Not drawn: 8 seeds that never left DORMANT." in words(figure)


def test_stage_map_of_many_seeds_stays_readable(large_run: report.Run) -> None:
    figure = figures.stage_map(large_run)
    written = words(figure)
    assert sum(word.startswith("#") for word in written) == 64
    assert {"encoder", "hidden.0", "hidden.1", "head"} <= set(written)
    assert any(word.startswith("Drawn: 64 of these 300 seeds") for word in written)
    assert any("Left out: 236 seeds" in word for word in written)
    assert "Not drawn: 100 seeds that never left DORMANT." in written
    assert figure.get_figheight() < 12


def test_the_legend_holds_only_stages_that_occur() -> None:
    event = {
        "arm": "grown",
        "step": 5,
        "seed": 0,
        "site": "s",
        "chunk": 0,
        "from": "DORMANT",
        "to": "GERMINATED",
        "cause": "policy:x",
    }
    written = words(figures.stage_map(report.Run(summary={}, events=[event], metrics=[])))
    assert {"Dormant", "Germinated"} <= set(written)
    assert not {info.label for info in STAGES.values()} & set(written) - {"Dormant", "Germinated"}


def test_histories_follow_the_events(run: report.Run) -> None:
    seeds = histories(run, "grown")
    assert [h.seed for h in seeds] == list(range(24))
    for history in seeds:
        assert history.stays[0].stage == "DORMANT"
        assert history.stays[-1].end == 2_000
        for a, b in itertools.pairwise(history.stays):
            assert a.end == b.start


def test_alpha_has_one_line_for_each_life(run: report.Run, large_run: report.Run) -> None:
    lives = ramps(run, "grown")
    fated = sum(ramp.fate is not None for ramp in lives)
    assert len(figures.alpha_curves(run).axes[0].lines) == len(lives) + fated
    fossils = {e["seed"] for e in run.events if e["arm"] == "grown" and e["to"] == "FOSSILIZED"}
    assert {ramp.seed for ramp in lives if ramp.fate == "FOSSILIZED"} == fossils
    assert any("adapters are drawn" in word for word in words(figures.alpha_curves(large_run)))


def test_a_seed_that_tries_again_has_two_lives() -> None:
    def event(step: int, to: str) -> dict[str, Any]:
        return {"arm": "grown", "step": step, "seed": 4, "site": "s", "to": to}

    def metrics(step: int, alpha: dict[str, float | None]) -> dict[str, Any]:
        return {"arm": "grown", "step": step, "alpha": alpha}

    run = report.Run(
        summary={},
        events=[event(20, "CULLED"), event(60, "FOSSILIZED")],
        metrics=[
            metrics(10, {"4": 0.5}),
            metrics(30, {}),
            metrics(40, {"4": None}),
            metrics(50, {"4": 1}),
        ],
    )
    first, second = ramps(run, "grown")
    assert (first.fate, second.fate) == ("CULLED", "FOSSILIZED")
    np.testing.assert_array_equal(second.alpha, [np.nan, 1])


def test_a_ramp_begins_and_ends_where_the_events_say() -> None:
    """Between two samples, and each life of a seed by its own events."""

    def event(step: int, origin: str, to: str) -> dict[str, Any]:
        return {"arm": "grown", "step": step, "seed": 4, "site": "s", "from": origin, "to": to}

    def metrics(step: int, alpha: dict[str, float]) -> dict[str, Any]:
        return {"arm": "grown", "step": step, "alpha": alpha}

    run = report.Run(
        summary={},
        events=[
            event(30, "TRAINING", "GRAFTING"),
            event(60, "GRAFTING", "CULLED"),
            event(83, "TRAINING", "GRAFTING"),
            event(90, "GRAFTING", "STABILIZATION"),
        ],
        metrics=[
            metrics(25, {"4": 0.0}),
            metrics(50, {"4": 0.6}),
            metrics(75, {}),
            metrics(80, {"4": 0.0}),
            metrics(90, {"4": 0.9}),
            metrics(100, {"4": 1.0}),
        ],
    )
    first, second = ramps(run, "grown")
    np.testing.assert_array_equal(first.steps, [25, 30, 50])
    np.testing.assert_array_equal(first.alpha, [0, 0, 0.6])
    np.testing.assert_array_equal(second.steps, [80, 83, 90, 100])
    np.testing.assert_array_equal(second.alpha, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("draw", "key"),
    [
        (figures.loss_curves, "loss"),
        (figures.accuracy_curves, "test_accuracy"),
        (figures.parameters_over_time, "parameters"),
    ],
)
def test_curves_hold_every_arm_and_name_it_at_its_end(
    draw: Callable[[report.Run], Figure], key: str, run: report.Run
) -> None:
    figure = draw(run)
    for curve in curves(run, key):
        (line,) = lines(figure, label=curve.arm)
        np.testing.assert_array_equal(line.get_xdata(), curve.steps)
        means = None if key == "parameters" else smooth(curve.values)
        expected = curve.values if means is None else means
        np.testing.assert_array_equal(line.get_ydata(), expected)
    for name in ("host alone", "grown", "random growth", "static, equal size"):
        assert any(word.startswith(f"{name}  ") for word in words(figure))


@pytest.mark.parametrize("draw", [figures.loss_curves, figures.accuracy_curves])
def test_moves_of_the_grown_arm_are_marked(
    draw: Callable[[report.Run], Figure], run: report.Run
) -> None:
    figure = draw(run)
    for stage in ("GERMINATED", "GRAFTING", "FOSSILIZED", "CULLED"):
        steps = sorted(e["step"] for e in run.events if e["arm"] == "grown" and e["to"] == stage)
        (marks,) = lines(figure, label=stage)
        assert list(marks.get_xdata()) == steps
    assert {"germinated", "fossilized", "culled"} <= set(words(figure))


def test_a_loss_over_many_orders_is_drawn_on_a_logarithmic_scale() -> None:
    metrics = [{"arm": "host", "step": s, "loss": 10.0 ** (-s / 100)} for s in range(400)]
    metrics += [{"arm": "grown", "step": 0, "loss": None}]
    figure = figures.loss_curves(report.Run(summary={}, events=[], metrics=metrics))
    assert figure.axes[0].get_yscale() == "log"
    assert not lines(figure, label="grown")


def test_long_curves_are_thinned_with_both_ends_kept() -> None:
    metrics = [{"arm": "host", "step": s, "loss": float(s % 7)} for s in range(50_000)]
    (curve,) = curves(report.Run(summary={}, events=[], metrics=metrics), "loss")
    assert len(curve.steps) == 1_000
    assert (curve.steps[0], curve.steps[-1]) == (0, 49_999)
    assert np.all(np.diff(curve.steps) > 0)
    assert abs(curve.values.mean() - 3) < 0.05


def test_bars_start_at_zero_and_show_every_arm(run: report.Run) -> None:
    figure = figures.baseline_bars(run)
    bars = figure.axes[0].patches
    means = run.summary["repeats"]["intervals"]
    keys = (
        "host_accuracy",
        "grown_accuracy",
        "random_growth_accuracy",
        "static_equal_params_accuracy",
    )
    assert [bar.get_width() for bar in bars] == [means[key]["mean"] for key in keys]
    assert all(bar.get_x() == 0 for bar in bars)
    assert figure.axes[0].get_xlim()[0] == 0
    dots = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 10]
    assert len(dots) == 3


def test_bars_of_one_run_have_no_interval() -> None:
    figure = figures.baseline_bars(synthetic(repeats=0))
    assert len(figure.axes[0].patches) == 4
    assert not figure.axes[0].lines
    assert any("One run each" in word for word in words(figure))


def test_bars_do_without_baselines(run: report.Run) -> None:
    summary = {"schema": 1, "grown_accuracy": 0.5, "host_accuracy": None, "repeats": None}
    figure = figures.baseline_bars(report.Run(summary=summary, events=[], metrics=[]))
    assert len(figure.axes) == 1
    assert len(figure.axes[0].patches) == 1


def test_where_it_grew_needs_a_measured_potential(run: report.Run) -> None:
    figure = figures.where_it_grew(run)
    assert figure is not None
    assert len(figure.axes[0].patches) == 4
    assert len(figure.axes[1].patches) == 8
    silent = [{**event, "measured": {}} for event in run.events]
    assert figures.where_it_grew(report.Run(summary={}, events=silent, metrics=[])) is None


def test_names_from_data_are_never_read_as_mathematics(run: report.Run) -> None:
    events = [{**event, "site": "$\\frac{$ \x00 层"} for event in run.events]
    for draw in (figures.stage_map, figures.where_it_grew):
        figure = draw(report.Run(summary={}, events=events, metrics=[]))
        assert figure is not None
        assert any("$\\frac{$" in word and "\x00" not in word for word in words(figure))


def test_without_matplotlib_the_remedy_is_named(
    run: report.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'esper-fn\[cli\]'"):
        figures.stage_map(run)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([5.0, 5.0], [4.0, 6.0]),
        ([9.0, 1.0], [9.0, 1.0]),
        ([0.0, 0.0], [0.0, 2.0]),
        ([10.0, 10.0, 9.0], [8.0, 10.0, 6.0]),
        ([4.0, 5.0, 7.0], [3.0 + 1 / 3, 5.0 + 1 / 3, 7.0 + 1 / 3]),
    ],
)
def test_spread_keeps_the_gap_and_the_order(places: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(spread(places, gap=2, low=0, high=10), expected)


def test_spread_squeezes_what_does_not_fit() -> None:
    np.testing.assert_allclose(spread([1, 1, 1], gap=9, low=0, high=10), [0, 5, 10])


def test_short_names_stay_apart() -> None:
    layers = [f"encoder.layers.{i}.attention.output" for i in (11, 12)]
    assert list(short_names([*layers, "head"], limit=18).values()) == [
        "encoder.layers.11…",
        "encoder.layers.12…",
        "head",
    ]
    assert short_names(["a" * 30], limit=9) == {"a" * 30: "aaaa…aaaa"}
    alike = ["a" * 30 + str(i) + "b" * 30 for i in range(2)]
    assert list(short_names(alike, limit=9).values()) == ["0: aaaaa…", "1: aaaaa…"]


def test_signs_of_differences() -> None:
    minus, zero = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"
    assert [points(v) for v in (0.012, -0.012, -0.0001)] == ["+1.2", f"{minus}1.2", f"{zero}0.0"]
    assert [points_tick(v) for v in (0.0, 0.05, -0.025)] == ["0", "+5", f"{minus}2.5"]


# Machado, Oliveira and Fernandes (2009), severity 1, acting on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]


def lab(color: str, sight: Any) -> Any:
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(sight) @ linear, 0, 1)
    ratio = np.array(TO_XYZ) @ seen / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("mode", ["color", "dark_color"])
def test_stage_colours_stay_apart_for_every_sight(sight: str, mode: str) -> None:
    seen = {name: lab(getattr(info, mode), SIGHT[sight]) for name, info in STAGES.items()}
    nearest = min(
        float(np.linalg.norm(seen[a] - seen[b])) for a, b in itertools.combinations(seen, 2)
    )
    assert nearest >= 20
