"""Importing the package costs nothing of the bus; the bus costs nothing of JAX."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from esper_fn import bus

ROOT = Path(__file__).resolve().parents[2]


def loaded(code, *names):
    script = f"{code}\nimport sys\nprint([n for n in {list(names)!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code", ["import esper_fn", "from esper_fn import runtime", "import esper_fn.cli"]
)
def test_the_bus_is_loaded_only_when_it_is_used(code):
    assert loaded(code, "redis", "msgspec", "prometheus_client", "opentelemetry") == "[]"


def test_the_bus_and_the_monitoring_load_no_jax():
    assert loaded("import esper_fn.bus, esper_fn.monitoring", "jax", "flax", "rich") == "[]"


COMMANDS = (
    "Batch Cancel Checkpoint Cull Germinate Pause PauseSeed Release Resume ResumeSeed RollBack \
SetGraft Stop Transition"
)
REPORTS = "Alert Announcement CheckpointEvent DeadLetter Frame Heartbeat LifecycleEvent Outcome \
StepMetrics"
PARTS = "COMMANDS Column Command Message SeedCommand SeedOutcome Topic verb"
USE = "AsyncClient Broker Client Keyring NO_KEYS PrivateServer RunPosition connect connect_async \
new_key read_keys"


def test_the_public_names_are_these():
    assert set(bus.__all__) == {*COMMANDS.split(), *REPORTS.split(), *PARTS.split(), *USE.split()}
    assert {name for name in vars(bus) if name[0] != "_"} <= {*bus.__all__}


def test_the_linter_sees_every_logger_and_refuses_words_made_in_advance():
    """Ruff's rules G and LOG know a logger by its name: `_LOGGER`."""
    made = re.compile(r"^(\w+) = logging\.getLogger\(__name__\)$", re.MULTILINE)
    names = [
        name
        for package in ("esper_fn", "torch_bridge", "kernels")
        for path in (ROOT / package).rglob("*.py")
        for name in made.findall(path.read_text())
    ]
    assert set(names) == {"_LOGGER"}
    head = "import logging\n\n_LOGGER = logging.getLogger(__name__)\nNUMBER = 3\n"
    bad = ['_LOGGER.info(f"{NUMBER}")', '_LOGGER.info("a" + str(NUMBER))', 'logging.info("a")']
    for line in ('_LOGGER.info("%s", NUMBER)', *bad):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--stdin-filename", "esper_fn/_x.py", "-"],
            input=f'"""Logs."""\n\n{head}{line}\n',
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 1) == (line in bad), done.stdout
        assert line not in bad or "G00" in done.stdout or "LOG" in done.stdout
