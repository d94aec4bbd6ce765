"""Types for annotations: values that functions of this library take and return."""

from esper_fn._layout import Bank, Layout
from esper_fn._sites import Moments, Seeds, Site
from esper_fn._typing import Implementation
from esper_kernels import Statistics

__all__ = ["Bank", "Implementation", "Layout", "Moments", "Seeds", "Site", "Statistics"]
