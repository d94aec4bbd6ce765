"""One seed for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from esper_fn._layout import Layout
from esper_fn.lifecycle import Seed, SeedState, Stage


def read_seed(layout: Layout, grafts: Sequence[str], seeds: SeedState, index: int) -> Seed:
    """A row of `seeds`, with names in place of indices, and None for what is not measured.

    Args:
      layout: the static layout.
      grafts: names of the alpha schedules.
      seeds: all rows.
      index: of the seed.

    Raises:
      LayoutError: there is no such seed.
    """
    site, layer, chunk = layout.locate(index)
    row = jax.device_get(jax.tree.map(lambda leaf: leaf[index], seeds))
    telemetry = row.telemetry

    def measured(value: Any, count: Any) -> float | None:
        return float(value) if count > 0 else None

    return Seed(
        index=index,
        site=site.name,
        layer=layer,
        chunk=chunk,
        stage=Stage(int(row.stage)),
        parent=Stage(int(row.parent)),
        steps_in_stage=int(row.steps_in_stage),
        blueprint=layout.names[int(row.blueprint)] if row.blueprint >= 0 else None,
        slot=int(row.slot) if row.slot >= 0 else None,
        alpha=float(row.alpha),
        graft=grafts[int(row.graft)],
        embargo_steps=int(row.embargo_steps),
        error_count=int(row.error_count),
        stability=float(row.stability),
        utility=measured(telemetry.utility, telemetry.num_live_steps),
        potential=measured(row.potential, row.num_potentials),
        contribution=measured(row.contribution, row.num_contributions),
    )
