"""Invented runs with every stage, for the tests of the report and for looking at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from esper_fn import report

WAY = [
    ("GERMINATED", "policy:plateau"),
    ("TRAINING", "gate:training_place"),
    ("GRAFTING", "gate:utility_settled"),
    ("STABILIZATION", "gate:alpha_full"),
    ("EVALUATING", "gate:loss_settled"),
    ("FINE_TUNING", "gate:contribution"),
    ("FOSSILIZED", "gate:contribution_held"),
]
LENGTHS = [30, 160, 220, 120, 40, 260]


def synthetic(
    num_seeds: int = 24,
    num_dormant: int = 8,
    *,
    steps: int = 2_000,
    interval: int = 10,
    repeats: int = 10,
    task: str = "classification",
    seed: int = 0,
) -> report.Run:
    rng = np.random.default_rng(seed)
    sites = ["encoder", "hidden.0", "hidden.1", "head"]
    events: list[dict[str, Any]] = []
    alphas: dict[str, dict[int, dict[str, float]]] = {}
    for arm in ("grown", "random"):
        alphas[arm] = {}
        for i in range(num_seeds):
            site = sites[i * len(sites) // num_seeds]
            _one_seed(
                rng,
                arm=arm,
                seed=i,
                site=site,
                steps=steps,
                events=events,
                alphas=alphas[arm],
            )
    metrics = _metrics(
        rng,
        steps=steps,
        interval=interval,
        events=events,
        alphas=alphas,
        total=num_seeds + num_dormant,
    )
    summary = _summary(
        rng,
        steps=steps,
        repeats=repeats,
        events=events,
        total=num_seeds + num_dormant,
        task=task,
        metrics=metrics,
    )
    return report.Run(summary=summary, events=events, metrics=metrics)


def write(run: report.Run, path: Path) -> Path:
    with report.create(path) as folder:
        for event in run.events:
            folder.append_event(event)
        for record in run.metrics:
            folder.append_metrics(record)
        folder.finish(run.summary)
    return path


def _one_seed(
    rng: np.random.Generator,
    *,
    arm: str,
    seed: int,
    site: str,
    steps: int,
    events: list[dict[str, Any]],
    alphas: dict[int, dict[str, float]],
) -> None:
    step = int(rng.integers(60, steps // 2))
    chunk = seed % 6
    quality = rng.normal(0.4 if arm == "grown" else -0.2) + (0.5 if site == "hidden.1" else 0)
    stage = "DORMANT"
    spans: list[tuple[int, int, str]] = []

    def move(to: str, cause: str, **quantities: float | None) -> None:
        nonlocal stage
        events.append(
            {
                "arm": arm,
                "step": step,
                "seed": seed,
                "site": site,
                "chunk": chunk,
                "blueprint": ("low_rank", "mlp")[seed % 2],
                "from": stage,
                "to": to,
                "cause": cause,
                "measured": quantities,
            }
        )
        stage = to

    for i, (to, cause) in enumerate(WAY):
        quantities: dict[str, float | None] = {}
        if to == "GERMINATED":
            quantities = {"potential": float(np.exp(quality + rng.normal(0, 0.3)))}
        elif i > 2:
            quantities = {
                "contribution": float(0.01 * quality + rng.normal(0, 0.002)),
                "stability": None if i == 3 else float(rng.uniform(0.8, 1)),
            }
        move(to, cause, **quantities)
        if to == "FOSSILIZED":
            spans.append((step, steps, to))
            break
        length = int(LENGTHS[i] * rng.uniform(0.6, 1.5))
        start, step = step, step + length
        spans.append((start, min(step, steps), to))
        if step >= steps:
            break
        chance, end, why = _ends(quality).get(to, (0.0, "", ""))
        if rng.random() < chance:
            move(end, why, contribution=-0.004)
            step += 150
            if end != "ROLLED_BACK" and step < steps:
                move("DORMANT", "embargo:over")
            break
    _add_alphas(alphas, seed, spans)


def _ends(quality: float) -> dict[str, tuple[float, str, str]]:
    """How likely a life ends in a stage, where it goes then, and why."""
    return {
        "GERMINATED": (0.04, "CANCELLED", "command:cancel"),
        "TRAINING": (0.1, "CULLED", "gate:utility_negative"),
        "GRAFTING": (0.06, "ROLLED_BACK", "governor:non_finite"),
        "EVALUATING": (0.75 if quality < 0 else 0.05, "CULLED", "gate:contribution_negative"),
    }


def _add_alphas(
    alphas: dict[int, dict[str, float]], seed: int, spans: list[tuple[int, int, str]]
) -> None:
    for start, stop, stage in spans:
        if stage in {"CULLED", "CANCELLED", "ROLLED_BACK", "DORMANT"}:
            continue
        for t in range(start, stop + 1):
            level = {"GERMINATED": 0.0, "TRAINING": 0.0}.get(stage, 1.0)
            if stage == "GRAFTING":
                level = (t - start) / max(1, stop - start)
            alphas.setdefault(t, {})[str(seed)] = round(level, 4)


def _metrics(
    rng: np.random.Generator,
    *,
    steps: int,
    interval: int,
    events: list[dict[str, Any]],
    alphas: dict[str, dict[int, dict[str, float]]],
    total: int,
) -> list[dict[str, Any]]:
    floor = {"host": 0.62, "grown": 0.30, "random": 0.40, "static": 0.27}
    top = {"host": 0.842, "grown": 0.917, "random": 0.893, "static": 0.924}
    metrics = []
    stages = {arm: dict.fromkeys(range(total), "DORMANT") for arm in ("grown", "random")}
    pending = sorted(events, key=lambda e: e["step"])
    for step in range(0, steps + 1, interval):
        while pending and pending[0]["step"] <= step:
            event = pending.pop(0)
            stages[event["arm"]][event["seed"]] = event["to"]
        for arm in ("host", "grown", "random", "static"):
            t = step / steps
            fall = np.exp(-t * (9 if arm in {"host", "static"} else 6))
            loss = floor[arm] + (2.3 - floor[arm]) * fall + rng.normal(0, 0.05)
            is_measured = step % (interval * 5) == 0
            accuracy = top[arm] - (top[arm] - 0.1) * fall**1.3 + rng.normal(0, 0.004)
            record: dict[str, Any] = {
                "arm": arm,
                "step": step,
                "loss": float(loss),
                "test_accuracy": float(accuracy) if is_measured else None,
                "test_loss": float(loss + 0.05) if is_measured else None,
                "parameters": {"host": 4_810, "static": 9_130}.get(arm, 4_810),
            }
            if arm in stages:
                adapters = alphas[arm].get(step, {})
                record["parameters"] += 264 * len(adapters)
                current = list(stages[arm].values())
                record["stages"] = {s: current.count(s) for s in dict.fromkeys(current)}
                record["alpha"] = adapters
            metrics.append(record)
    return metrics


def _summary(
    rng: np.random.Generator,
    *,
    steps: int,
    repeats: int,
    events: list[dict[str, Any]],
    total: int,
    task: str,
    metrics: list[dict[str, Any]],
) -> dict[str, Any]:
    keys = {
        "host": "host_accuracy",
        "grown": "grown_accuracy",
        "static": "static_equal_params_accuracy",
        "random": "random_growth_accuracy",
    }
    last = {m["arm"]: m for m in metrics}
    summary: dict[str, Any] = {
        "schema": 1,
        "data": "digits",
        "host": "mlp",
        "task": task,
        "steps": steps,
        "seed": 0,
        "policy": "plateau",
        "seeds_total": total,
        "recompilations_after_first_step": 0,
        "wall_seconds": 73.4,
        "train_flops": {"host": 8.1e9, "grown": 1.31e10, "random": 1.35e10, "static": 1.52e10},
        "versions": {"esper-fn": "0.1.0", "jax": "0.10.2", "numpy": "2.4.6", "python": "3.11.7"},
        "device": "cpu",
        "repeats": None,
    }
    for arm, key in keys.items():
        summary[key] = last[arm]["test_accuracy"]
        summary[f"{arm}_params"] = last[arm]["parameters"]
    for stage in ("FOSSILIZED", "CULLED"):
        name = f"seeds_{stage.lower()}"
        summary[name] = sum(e["to"] == stage for e in events if e["arm"] == "grown")
    if repeats:
        rows = [
            {"seed": i, **{k: float(summary[k] + rng.normal(0, 0.006)) for k in keys.values()}}
            for i in range(repeats)
        ]
        intervals = {k: _interval([row[k] for row in rows]) for k in keys.values()}
        for arm in ("host", "random", "static"):
            gaps = [row[keys["grown"]] - row[keys[arm]] for row in rows]
            intervals[f"grown_minus_{arm}"] = _interval(gaps)
        summary["repeats"] = {"count": repeats, "rows": rows, "intervals": intervals}
    return summary


def _interval(values: list[float]) -> dict[str, float]:
    mean = float(np.mean(values))
    half = float(2.26 * np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}
