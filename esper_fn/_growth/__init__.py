"""One growing network: the assembly of layout, lifecycle, grafting, policy and governor."""

from esper_fn._growth._growth import Growth
from esper_fn._growth._state import GrowthState, LossFn, StepInfo
from esper_fn._survey import SurveyInfo

__all__ = ["Growth", "GrowthState", "LossFn", "StepInfo", "SurveyInfo"]
