"""Small files in the published formats, whose digests stand in for the published ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import fashion_arrays, idx_gz, mnist1d_arrays, npz

from esper_fn.demo.data import _files


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file below `tmp_path/data` and make its digest the published one."""

    def plant(name: str, content: bytes) -> Path:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        published = _files.PublishedFile(
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            published_at=_files.FILES[name].published_at,
        )
        monkeypatch.setitem(_files.FILES, name, published)
        return path

    return plant


@pytest.fixture
def data_folder(
    tmp_path: Path, plant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a sound small file for every loader; it is what `$ESPER_DATA` names."""
    for name, array in fashion_arrays().items():
        plant(name, idx_gz(array))
    plant("mnist1d/mnist1d.npz", npz(**mnist1d_arrays()))
    lines = "".join(f"line {number}: to be, or not to be?\n" for number in range(200))
    plant("tinyshakespeare/input.txt", lines.encode())
    monkeypatch.setenv("ESPER_DATA", str(tmp_path / "data"))
    return tmp_path / "data"
