"""JSON that is small on the disk and large in memory is refused before it is parsed."""

from __future__ import annotations

import tracemalloc

import pytest

from esper_fn import report
from esper_fn.errors import RunFolderError


@pytest.mark.parametrize("name", ["summary.json", "events.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("piece", [b"[],", b"{},", b"0,"])
def test_a_bomb_is_refused_before_it_is_parsed(name, piece, tmp_path):
    with report.create(tmp_path / "run") as folder:
        folder.finish({"data": "d"})
    bomb = b'{"schema": 1, "x": [' + piece * (12 * 2**20 // len(piece)) + b"0]}\n"
    (tmp_path / "run" / name).write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(RunFolderError, match="more than 1000000 values"):
            report.read(tmp_path / "run")
        assert tracemalloc.get_traced_memory()[1] < 5 * len(bomb)
    finally:
        tracemalloc.stop()
