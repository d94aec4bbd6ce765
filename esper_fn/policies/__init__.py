"""Rules that decide where and when to grow, and how they nest.

A policy asks (`grow`, `plateau`, `periodic`, `random`, `scripted`, `never`) or holds back
(`budget`, `cooldown`, `concurrency`, `quota`, `until`); `chain` puts several behind one another
and notes which of them allowed or refused what.
"""

from esper_fn.policies._base import Observation, Policy, Requests, chain, no_requests, rule, strike
from esper_fn.policies._grow import grow
from esper_fn.policies._limit import budget, concurrency, cooldown, quota, until
from esper_fn.policies._propose import Score, never, periodic, plateau, random, scripted

__all__ = [
    "Observation",
    "Policy",
    "Requests",
    "Score",
    "budget",
    "chain",
    "concurrency",
    "cooldown",
    "grow",
    "never",
    "no_requests",
    "periodic",
    "plateau",
    "quota",
    "random",
    "rule",
    "scripted",
    "strike",
    "until",
]
