import pytest
from synthetic_run import synthetic

from esper_fn import report


@pytest.fixture(scope="session")
def run() -> report.Run:
    return synthetic()


@pytest.fixture(scope="session")
def large_run() -> report.Run:
    return synthetic(300, 100, repeats=0)


@pytest.fixture
def bare_run() -> report.Run:
    return report.Run(summary={"schema": 1}, events=[], metrics=[])
