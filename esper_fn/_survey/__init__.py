"""Surveys: where growth would pay, and what living adapters are worth, on held-out data."""

from esper_fn._survey._ablation import losses_without, seeds_to_ablate
from esper_fn._survey._apply import Ablations, SurveyInfo, apply_survey
from esper_fn._survey._directions import (
    Directions,
    SiteDirections,
    clear_directions,
    consume_directions,
    has_directed,
    no_directions,
    slot_directions,
)
from esper_fn._survey._potential import NUM_DIRECTIONS, Potentials, directions, potentials

__all__ = [
    "NUM_DIRECTIONS",
    "Ablations",
    "Directions",
    "Potentials",
    "SiteDirections",
    "SurveyInfo",
    "apply_survey",
    "clear_directions",
    "consume_directions",
    "directions",
    "has_directed",
    "losses_without",
    "no_directions",
    "potentials",
    "seeds_to_ablate",
    "slot_directions",
]
