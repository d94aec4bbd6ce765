"""One compiled run for all tests of this folder."""

from __future__ import annotations

import pytest
from growing import Job, mlp


@pytest.fixture(scope="session")
def job() -> Job:
    return mlp()
