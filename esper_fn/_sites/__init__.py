"""What a site computes: its specification, the rule over its live adapters, and derivatives."""

from esper_fn._sites._passes import forward
from esper_fn._sites._probe import Moments, zero_moments
from esper_fn._sites._schedule import BankView, SiteConfig
from esper_fn._sites._scope import Mark, marked
from esper_fn._sites._seeds import NoSeeds, Seeds, SeedsStructure, SiteView, Visits
from esper_fn._sites._site import Site, site
from esper_kernels import Statistics

__all__ = [
    "BankView",
    "Mark",
    "Moments",
    "NoSeeds",
    "Seeds",
    "SeedsStructure",
    "Site",
    "SiteConfig",
    "SiteView",
    "Statistics",
    "Visits",
    "forward",
    "marked",
    "site",
    "zero_moments",
]
