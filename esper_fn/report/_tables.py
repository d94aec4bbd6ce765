"""Writes what the page has besides figures: cards, tables and lists, every string escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

from esper_fn.report._bars import Score, scores
from esper_fn.report._folder import Run
from esper_fn.report._format import TIMES, clean, count, percent
from esper_fn.report._words import (
    ACCURACY_KEY,
    ARM_LABEL,
    ARMS,
    GROWING_ARMS,
    PARAMS_KEY,
    STAGES,
    accuracy_name,
    number,
)

MAX_EVENTS: Final = 500
NOTHING: Final = "\N{EN DASH}"
_FACTS: Final = {
    "seeds_total": "seeds",
    "seeds_fossilized": "fossilized",
    "seeds_culled": "culled",
    "recompilations_after_first_step": "recompilations after the first step",
    "wall_seconds": "wall time",
}
_SHOWN_ELSEWHERE: Final = {
    "schema",
    "versions",
    "repeats",
    "rollbacks",
    "train_flops",
    *ACCURACY_KEY.values(),
    *PARAMS_KEY.values(),
    *_FACTS,
}
_CARD_ORDER: Final = ("grown", "static", "uniform", "random", "host")


def safe(value: object) -> str:
    """Escapes `value` so that a page shows it as text: no markup, no control characters."""
    return escape(clean(str(value)), quote=True)


def table(head: Iterable[str], rows: Iterable[Iterable[str]], numeric: Iterable[int] = ()) -> str:
    """Writes a table of cells that are already safe; columns in `numeric` are set flush right."""
    right = set(numeric)

    def line(cells: Iterable[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="num">{cell}</{tag}>' if i in right else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(head, 'th')}</tr></thead>\n<tbody>{body}</tbody></table>"


def cards(run: Run) -> str:
    """Writes the headline numbers: the final accuracy of every arm."""
    by_arm = {score.arm: score for score in scores(run)}
    return "".join(_card(run, arm, by_arm.get(arm)) for arm in _CARD_ORDER)


def _card(run: Run, arm: str, score: Score | None) -> str:
    params = number(run.summary, PARAMS_KEY[arm])
    lines = []
    if score is None:
        value = NOTHING
        lines.append("not recorded")
    else:
        value = percent(score.value)
        if score.interval is not None:
            low, high = (percent(end) for end in score.interval[1:])
            lines.append(f"{percent(0.95, 0)} interval {low} to {high}")
    if params is not None:
        lines.append(f"{count(params)} parameters")
    notes = "".join(f"<span>{line}</span>" for line in lines)
    return f'<div class="card {arm}"><h3>{ARM_LABEL[arm]}</h3><strong>{value}</strong>{notes}</div>'


def facts(run: Run) -> str:
    """Writes the second row: seeds, recompilations and time, where they were recorded."""
    values = {key: number(run.summary, key) for key in _FACTS}
    entries = [
        ((duration if key == "wall_seconds" else count)(value), _FACTS[key])
        for key, value in values.items()
        if value is not None
    ]
    return "".join(f"<li><b>{value}</b> {name}</li>" for value, name in entries)


def duration(seconds: float) -> str:
    """Formats a time for people: 9.4 s, 3 min 12 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def swatch(stage: str) -> str:
    """Writes the name of a stage with its colour."""
    info = STAGES.get(stage)
    if info is None:
        return safe(stage)
    return f'<span class="stage"><i style="background:var(--stage-{stage})"></i>{info.label}</span>'


def stage_table(run: Run) -> str:
    """Explains each stage and counts how often seeds of the grown arm entered it."""
    entered = dict.fromkeys(STAGES, 0)
    for event in run.events:
        if event["arm"] == "grown" and event["to"] in entered:
            entered[event["to"]] += 1
    rows = [
        [str(i), swatch(stage), info.meaning, count(entered[stage])]
        for i, (stage, info) in enumerate(STAGES.items())
    ]
    return table(["", "stage", "what it means", "entered"], rows, numeric=[0, 3])


def event_table(run: Run) -> str:
    """Lists the first `MAX_EVENTS` lifecycle events and says how many there are."""
    if not run.events:
        return "<p>No seed changed its stage in this run.</p>"
    events = sorted(run.events, key=lambda event: event["step"])
    listed = events[:MAX_EVENTS]
    has_arms = len({event["arm"] for event in events}) > 1
    head = ["step", "arm", "site [chunk]", "seed", "from → to", "adapter", "cause", "measured"]
    rows = [
        [
            count(event["step"]),
            safe(event["arm"]),
            f"{safe(event['site'])} [{event['chunk']}]",
            f"#{event['seed']}",
            f"{swatch(event['from'])} → {swatch(event['to'])}",
            NOTHING if event.get("blueprint") is None else safe(event["blueprint"]),
            safe(event["cause"]),
            write_measurements(event.get("measured")),
        ]
        for event in listed
    ]
    if not has_arms:
        head.pop(1)
        for row in rows:
            row.pop(1)
    numeric = [0, 3] if has_arms else [0, 2]
    amount = (
        f"All {count(len(events))} events."
        if len(listed) == len(events)
        else f"The first {count(len(listed))} of {count(len(events))} events;"
        " the rest is in <code>events.jsonl</code>."
    )
    return f'<p>{amount}</p><div class="scroll" tabindex="0">{table(head, rows, numeric)}</div>'


def write_measurements(values: Mapping[str, Any] | None) -> str:
    """Writes measured quantities by name; one that was not measured differs from zero."""
    if not values:
        return NOTHING
    parts = []
    for key in values:
        value = number(values, key)
        parts.append(f"{safe(key)}&nbsp;{'not&nbsp;measured' if value is None else f'{value:.3g}'}")
    return ", ".join(parts)


def _spaced(name: str) -> str:
    """Spaces a name of the code into words: `policy:periodic` becomes policy: periodic."""
    return name.replace(":", ": ").replace("_", " ")


def rollback_section(run: Run) -> str:
    """Lists what the governor rolled back and quarantined, under a heading; may be empty."""
    by_arm = run.summary.get("rollbacks")
    rows = [
        [
            ARM_LABEL[arm],
            _amount(row, "step"),
            safe(_spaced(str(row.get("alarm", NOTHING))).lower()),
            _restored(row),
            _quarantined(row.get("quarantined")),
        ]
        for arm in GROWING_ARMS
        for row in _mappings(by_arm.get(arm) if isinstance(by_arm, dict) else None)[:MAX_EVENTS]
    ]
    if not rows:
        return ""
    head = ["", "step", "alarm", "host", "quarantined"]
    return f'<h2>What was rolled back</h2>\n<div class="wide">{table(head, rows, [1])}</div>\n'


def _mappings(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _amount(record: Mapping[str, Any], key: str) -> str:
    value = number(record, key)
    return NOTHING if value is None else count(value)


def _restored(row: Mapping[str, Any]) -> str:
    if number(row, "restored_step") is None:
        return "not moved"
    undone = number(row, "steps_undone")
    lost = "" if undone is None else f", {count(undone)} steps undone"
    return f"went back to step {_amount(row, 'restored_step')}{lost}"


def _quarantined(seeds: object) -> str:
    parts = []
    for seed in _mappings(seeds)[:20]:
        site = f"{safe(seed.get('site', NOTHING))} [{_amount(seed, 'chunk')}]"
        parts.append(f"seed #{_amount(seed, 'seed')} at {site}, {swatch(str(seed.get('stage')))}")
    more = len(_mappings(seeds)) - len(parts)
    return "; ".join(parts) + (f" and {count(more)} more" if more else "") or NOTHING


def cost_table(run: Run) -> str:
    """Writes training FLOPs, parameters and final accuracy of every arm."""
    by_arm = {score.arm: score for score in scores(run)}
    host = number(run.summary, "train_flops", "host")
    rows = []
    for arm in ARMS:
        flops = number(run.summary, "train_flops", arm)
        params = number(run.summary, PARAMS_KEY[arm])
        if flops is None and params is None and arm not in by_arm:
            continue
        ratio = f"{flops / host:.2f} {TIMES}" if flops is not None and host else NOTHING
        rows.append(
            [
                f'<span class="arm {arm}">{ARM_LABEL[arm]}</span>',
                NOTHING if flops is None else si(flops, "FLOP"),
                ratio,
                NOTHING if params is None else count(params),
                percent(by_arm[arm].value) if arm in by_arm else NOTHING,
            ]
        )
    if not rows:
        return "<p>No costs were recorded.</p>"
    head = ["", "training", "of the host's", "parameters", accuracy_name(run.summary)]
    return table(head, rows, numeric=[1, 2, 3, 4])


def si(value: float, unit: str) -> str:
    """Formats a number with a metric prefix: 13.1 GFLOP."""
    scaled, prefixes = value, iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    for larger in prefixes:
        if abs(scaled) < 999.5:
            break
        scaled, prefix = scaled / 1000, larger
    return f"{scaled:.3g} {prefix}{unit}"


def settings_table(run: Run) -> str:
    """Lists every plain entry of the summary that the page shows nowhere else."""
    rows = [
        [safe(_spaced(key)), _plain_value(value)]
        for key, value in run.summary.items()
        if key not in _SHOWN_ELSEWHERE
    ]
    return _pairs(rows)


def versions_table(run: Run) -> str:
    """Lists the versions of the software that made the run."""
    versions = run.summary.get("versions")
    rows = (
        [[safe(key), _plain_value(value)] for key, value in versions.items()]
        if isinstance(versions, dict)
        else []
    )
    return _pairs(rows)


def _plain_value(value: object) -> str:
    return safe(clean(_in_words(value), limit=300))


def _in_words(value: object) -> str:
    """Writes a JSON value without brackets: lists with commas, mappings with names in front."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        parts = [f"{_spaced(str(key))} {_nested(inner)}" for key, inner in value.items()]
        return ", ".join(parts) or NOTHING
    if isinstance(value, list):
        return ", ".join(map(_nested, value)) or NOTHING
    return str(value)


def _nested(value: object) -> str:
    words = _in_words(value)
    return f"({words})" if isinstance(value, dict | list) and words != NOTHING else words


def _pairs(rows: list[list[str]]) -> str:
    if not rows:
        return "<p>None were recorded.</p>"
    return "<dl>" + "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows) + "</dl>"
