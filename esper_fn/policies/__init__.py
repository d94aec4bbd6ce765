"""Policies: rules that decide where and when to grow, and how they nest.

A policy asks (`grow`, `plateau`, `periodic`, `random`, `scripted`, `never`), releases
(`recycle`) or limits (`budget`, `cooldown`, `max_concurrent`, `max_total`, `stop_after`); `chain`
puts several behind one another, and the decision log names the rule that asked or refused.

One of your own is `rule(name, init, decide)`, where `request` and `refuse` add and remove requests;
`check` tells whether it keeps the contract.
"""

from esper_fn.lifecycle._commands import Requests, no_requests
from esper_fn.policies._base import (
    Admit,
    Decide,
    Init,
    Observation,
    Policy,
    chain,
    refuse,
    request,
    rule,
)
from esper_fn.policies._check import check
from esper_fn.policies._grow import grow
from esper_fn.policies._limits import budget, cooldown, max_concurrent, max_total, stop_after
from esper_fn.policies._recycle import recycle
from esper_fn.policies._rules import never, periodic, plateau, random, scripted
from esper_fn.policies._select import Score, seed_blueprints

__all__ = [
    "Admit",
    "Decide",
    "Init",
    "Observation",
    "Policy",
    "Requests",
    "Score",
    "budget",
    "chain",
    "check",
    "cooldown",
    "grow",
    "max_concurrent",
    "max_total",
    "never",
    "no_requests",
    "periodic",
    "plateau",
    "random",
    "recycle",
    "refuse",
    "request",
    "rule",
    "scripted",
    "seed_blueprints",
    "stop_after",
]
