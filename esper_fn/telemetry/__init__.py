"""Averages of what the steps measure, and the scores of a survey."""

from esper_fn.telemetry._averages import SeedEvidence, take_in
from esper_fn.telemetry._potential import NUM_DIRECTIONS, Potentials, directions, potentials

__all__ = ["NUM_DIRECTIONS", "Potentials", "SeedEvidence", "directions", "potentials", "take_in"]
