"""Averages of what the steps measure, and the scores of a survey."""

from esper_fn.telemetry._averages import SeedEvidence, take_in
from esper_fn.telemetry._potential import Potentials, potentials

__all__ = ["Potentials", "SeedEvidence", "potentials", "take_in"]
