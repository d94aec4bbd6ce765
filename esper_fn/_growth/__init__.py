"""One growing network: the assembly of lattice, lifecycle, grafting, policy and governor."""

from esper_fn._growth._births import forget
from esper_fn._growth._growth import Growth, growth
from esper_fn._growth._state import GrowthState, Info, LossFn, SurveyInfo

__all__ = ["Growth", "GrowthState", "Info", "LossFn", "SurveyInfo", "forget", "growth"]
