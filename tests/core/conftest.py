"""Strict numerics for everything of ours."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_numerics() -> Iterator[None]:
    """No silent change of a dtype or rank. (Optax is not strict: see `support.standard`.)"""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
