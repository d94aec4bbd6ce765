"""`docs/benchmarks/`: one page a benchmark, written from the newest records and the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks._records import Record, read_records
from benchmarks._targets import Target, read_targets
from benchmarks._timing import Row

_HEADER = "| row | median | quartiles | unit | samples | target | |\n|---|---|---|---|---|---|---|"


def write_pages(names: Sequence[str], *, results: Path, targets: Path, docs: Path) -> list[Path]:
    """Writes a page for each benchmark that has a record, and an index; returns the files.

    Raises:
      BenchmarkError: a record or the targets cannot be read.
    """
    docs.mkdir(parents=True, exist_ok=True)
    pages = render_pages(names, results=results, targets=targets)
    files = []
    for name, text in pages.items():
        file = docs / name
        file.write_text(text, encoding="utf-8")
        files.append(file)
    return files


def render_pages(names: Sequence[str], *, results: Path, targets: Path) -> dict[str, str]:
    """The text of each page by file name, `index.md` among them.

    Args:
      names: the benchmarks, in the order of the index.
      results: folder of the records, `NAME.jsonl`.
      targets: the file of targets.
    """
    bounds = read_targets(targets)
    pages, index = {}, []
    for name in names:
        records = newest_records(results / f"{name}.jsonl")
        if records:
            pages[f"{name}.md"] = _page(name, records, bounds.get(name, {}))
            held, total = _count_held(records, bounds.get(name, {}))
            index.append(f"| [{name}]({name}.md) | {held} of {total} |")
    head = (
        "# Benchmarks\n\nWritten by `python -m benchmarks pages` from the records in "
        "`benchmarks/results/` and the bounds in `benchmarks/targets.toml`; not to be edited.\n\n"
        "| benchmark | targets met |\n|---|---|\n"
    )
    return {"index.md": head + "\n".join(index) + "\n", **pages}


def newest_records(path: Path) -> list[Record]:
    """The newest full record for each kind of device, oldest first.

    Raises:
      BenchmarkError: the file cannot be read.
    """
    full = [record for record in read_records(path) if not record.quick]
    newest = {record.device.get("platform"): record for record in full}
    return [record for record in full if any(record is kept for kept in newest.values())]


def _page(name: str, records: Sequence[Record], targets: Mapping[str, Target]) -> str:
    parts = [
        f"# {name}\n\n`python -m benchmarks {name} run` measures these figures and "
        f"`python -m benchmarks {name} check` holds them to their targets.\n"
    ]
    measured = {key for record in records for key in record.rows}
    for record in records:
        parts += [_conditions(record), _HEADER]
        parts += [_line(key, row, targets.get(key)) for key, row in record.rows.items()]
        parts.append("")
    missing = [key for key in targets if key not in measured]
    if missing:
        listed = "\n".join(f"- `{key}`: {targets[key]}" for key in missing)
        parts.append(f"## Not measured\n\n{listed}\n")
    return "\n".join(parts)


def _conditions(record: Record) -> str:
    device, git = record.device, record.git or {}
    commit = str(git.get("commit", "unknown"))[:10] + (" (dirty)" if git.get("is_dirty") else "")
    versions = ", ".join(
        f"{package} {record.versions[package]}"
        for package in ("python", "jax", "torch", "triton")
        if package in record.versions
    )
    return (
        f"## {device.get('name')}\n\n{record.date[:10]}, commit {commit}, "
        f"{device.get('num_cores', '?')} CPU cores; {versions}.\n"
    )


def _line(key: str, row: Row, target: Target | None) -> str:
    verdict = "" if target is None else ("missed" if target.failure(row) else "met")
    bound = "" if target is None else f"{target.bound.replace('_', ' ')} {target.value:g}"
    quartiles = "" if row.low == row.high else f"{row.low:.4g} to {row.high:.4g}"
    figures = f"{row.median:.4g} | {quartiles} | {row.unit} | {row.count}"
    return f"| {key} | {figures} | {bound} | {verdict} |"


def _count_held(records: Sequence[Record], targets: Mapping[str, Target]) -> tuple[int, int]:
    rows: dict[str, Row] = {}
    for record in records:
        rows |= record.rows
    held = sum(target.failure(rows.get(key)) is None for key, target in targets.items())
    return held, len(targets)
