"""Examples in docstrings run as printed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "esper_fn", ROOT / "torch_bridge", ROOT / "kernels" / "esper_kernels"]
NEEDS_TORCH = ("torch_bridge", "esper_kernels.torch", "esper_kernels.graft.torch")


def modules_with_examples() -> list[str]:
    names = []
    for folder in FOLDERS:
        for module in pkgutil.walk_packages([str(folder)], f"{folder.name}.", onerror=str):
            path = folder.parent.joinpath(*module.name.split("."))
            file = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
            if ">>> " in file.read_text(encoding="utf-8"):
                names.append(module.name)
        if ">>> " in (folder / "__init__.py").read_text(encoding="utf-8"):
            names.append(folder.name)
    return sorted(names)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run_as_printed(name: str, monkeypatch, tmp_path) -> None:
    if name.startswith(NEEDS_TORCH) and find_spec("torch") is None:
        pytest.skip("needs torch")
    monkeypatch.chdir(tmp_path)
    if name.startswith("esper_kernels") and find_spec("torch") is not None:
        import torch

        if not torch.cuda.is_available():
            monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    # Examples that need a server or a trainer are marked; all others run.
    assert result.attempted > 0 or "+SKIP" in Path(str(module.__file__)).read_text(encoding="utf-8")
    assert result.failed == 0


def test_there_are_examples() -> None:
    assert len(modules_with_examples()) > 20
