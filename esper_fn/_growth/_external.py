"""Steps for a host outside of JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from esper_fn._growth._advance import advance
from esper_fn._growth._newborns import newborn
from esper_fn._growth._state import GrowthState, Parts, StepInfo
from esper_fn._layout import slot_gains
from esper_fn._sites import Moments
from esper_fn._survey import Ablations, SiteDirections, SurveyInfo, apply_survey, seeds_to_ablate
from esper_fn._typing import Array, Bool, Float32, Int32, Key, Params, Scalar
from esper_fn.lifecycle._commands import Commands
from esper_fn.lifecycle._state import NONE
from esper_kernels import Statistics


class ExternalSteps(NamedTuple):
    """`Growth.update` and `Growth.survey` without the adapters, which the host holds itself.

    The state's `adapters` stay as they are.
    """

    parts: Parts
    max_ablations: int

    def advance(
        self,
        state: GrowthState,
        statistics: Statistics,
        loss: Scalar,
        *,
        drift: Float32[Array, "S"],
        has_broken: Bool[Array, "S"],
        commands: Commands | None = None,
    ) -> tuple[GrowthState, StepInfo, Key]:
        """`update` without the adapters: whoever holds them restores and initialises them.

        Args:
          state: before the step; its `adapters` stay as they are.
          statistics: as in `update`.
          loss: as in `update`.
          drift: how far each seed's adapter moved, over the size it had.
          has_broken: seeds whose adapter became non-finite and was restored.
          commands: as in `update`.

        Returns:
          The state, what happened, and the key for `newborn` of the slots whose `generation` rose.
        """
        return advance(
            self.parts,
            state,
            statistics,
            loss,
            drift=drift,
            has_broken=has_broken,
            commands=commands,
        )

    def gains(self, state: GrowthState) -> Float32[Array, "Q 4"]:
        """The gains of every slot, the columns of `esper_kernels.Gains`; zero for free slots."""
        return slot_gains(state.seeds, state.owner, state.settings)

    def newborn(
        self, key: Key, slot: int, seed: int = NONE, directions: SiteDirections | None = None
    ) -> Params:
        """The adapter that `update` puts into a slot, bit for bit. Not for use inside `jit`.

        Args:
          key: from `advance`.
          slot: on the flat slot axis.
          seed: the seed that holds it.
          directions: of the state before `advance`.
        """
        return newborn(self.parts.layout, key, slot, seed, directions)

    def seeds_to_ablate(self, state: GrowthState) -> tuple[Int32[Array, "V"], Bool[Array, "V"]]:
        """The seeds whose contribution a survey should measure now, and which rows count.

        Args:
          state: as it is surveyed.
        """
        return seeds_to_ablate(state.seeds, self.max_ablations)

    def apply_survey(
        self,
        state: GrowthState,
        moments: Sequence[Sequence[Array]],
        loss: Scalar,
        chosen: Int32[Array, "V"],
        is_chosen: Bool[Array, "V"],
        losses_without: Float32[Array, "V"],
    ) -> tuple[GrowthState, SurveyInfo]:
        """The state with a survey's measurements, and what they are.

        Args:
          state: as it was surveyed.
          moments: of each site the rows, `x^T dy`, `x^T x` and `dy^T dy` of every chunk.
          loss: on held-out data.
          chosen: from `seeds_to_ablate`.
          is_chosen: from `seeds_to_ablate`.
          losses_without: the loss without each of them.
        """
        own = [Moments(*site) for site in moments]
        ablations = Ablations(seed=chosen, is_measured=is_chosen, loss=losses_without)
        seeds, directions, info = apply_survey(
            self.parts.layout, state.seeds, state.directions, own, loss, ablations
        )
        return state._replace(seeds=seeds, directions=directions), info
