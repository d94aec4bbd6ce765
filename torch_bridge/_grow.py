"""Putting seeds into a torch model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import esper_fn as ef
from esper_fn.blueprints import Blueprint, Topology
from esper_fn.types import Layout, Site
from esper_kernels import Chunking
from torch_bridge import _compiler, _load
from torch_bridge._adapters import Form, form_of
from torch_bridge._banks import refresh_copy
from torch_bridge._bridge import Bridge
from torch_bridge._convert._devices import cpu_device
from torch_bridge._distributed import Group
from torch_bridge._errors import BridgeError
from torch_bridge._forward import grow_output
from torch_bridge._lifecycle import Lifecycle
from torch_bridge._plan import BankSlots, SitePlan
from torch_bridge._shared import Shared
from torch_bridge._site import Seeds
from torch_bridge._targets import Match, Targets, by_pattern, find

Empty: TypeAlias = Mapping[str, Mapping[str, np.ndarray]]
"""Zeros for all slots of a site, by blueprint and leaf."""


class GrowthOptions(TypedDict, total=False):
    """What `grow` passes on to `esper_fn.Growth`, which has the defaults.

    Attributes:
      policy: what asks for births and culls.
      graft: how newborn adapters come to act, one schedule or several.
      governor: the guard outside every policy.
      settings: the thresholds of the lifecycle.
      max_ablations: seeds whose contribution one survey measures.
      directed_births: seeds that are born along directions which a survey found.
    """

    policy: ef.policies.Policy | None
    graft: ef.grafting.AlphaSchedule | Sequence[ef.grafting.AlphaSchedule] | None
    governor: ef.governors.Governor | None
    settings: ef.lifecycle.Settings | None
    max_ablations: int | None
    directed_births: int


def grow(
    model: nn.Module,
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    chunks: int | Mapping[str, int] | None = None,
    blueprints: Mapping[str, Blueprint] | None = None,
    capacity: int = 16,
    features: Mapping[str, int] | None = None,
    topology: Topology | Mapping[str, Topology] | None = None,
    freeze_host: bool = False,
    stacked: bool = False,
    watch_every: int = 16,
    lag: int = 0,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    verbose: bool = True,
    **growth: Unpack[GrowthOptions],
) -> Bridge:
    """Puts seeds after some modules of a model, so that it grows while it trains.

    Make the optimiser afterwards, and compile afterwards; see `docs/bridge.md`.

    Args:
      model: any `nn.Module`; changed in place.
      targets: whose outputs grow; a name, pattern, class or function, or several.
      exclude: what `targets` shall leave out, with all that is inside of it.
      chunks: seeds along the feature axis, for all or by pattern; 16, or fewer for narrow layers.
      blueprints: what may grow, by name; `low_rank` if left out.
      capacity: adapters alive at once, for each target and blueprint.
      features: widths of the last axis by pattern, for targets of an unknown class.
      topology: of all targets or by pattern; images for convolutions, else vectors.
      freeze_host: takes `requires_grad` from the model's own parameters.
      stacked: whether the adapters of a bank are rows of one parameter.
      watch_every: steps between two measurements of dormant chunks; 0 for none.
      lag: steps by which the lifecycle follows, so that a GPU need not wait for Python.
      seed: of everything random in the lifecycle.
      process_group: whose ranks decide together; the default one, if there is any.
      verbose: prints what was found.
      **growth: see `GrowthOptions`.

    Returns:
      The bridge, whose `step` follows every `optimizer.step()`.

    Raises:
      BridgeError: a target matches nothing or cannot carry seeds, a blueprint has no torch form.
      LayoutError: sites, blueprints and capacity do not fit together.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> grow(model, targets="0", chunks=2, verbose=False).layout.num_seeds
    2
    """
    options = _Options(freeze_host, stacked, watch_every, lag, seed, process_group, verbose)
    _check(model, blueprints, options)
    cpu_device()  # before the arrays of the layout start JAX wherever it likes
    matches, skipped = find(model, targets, features, exclude)
    sites = _sites(matches, chunks, topology)
    blueprints = blueprints or {"low_rank": ef.blueprints.low_rank()}
    static = ef.Growth(sites=sites, blueprints=blueprints, capacity=capacity, **growth)
    return _reported(_assemble(model, matches, static, options), skipped, verbose)


def _reported(bridge: Bridge, skipped: Mapping[str, str], verbose: bool) -> Bridge:
    """Prints what was found, if that is wanted."""
    if verbose:
        reasons = skipped.items()
        left_out = [f"  left out by 'all-linear': {name} ({why})\n" for name, why in reasons]
        sys.stdout.write(f"{bridge.summary()}\n{''.join(left_out)}")
    return bridge


class _Options(NamedTuple):
    freeze_host: bool
    stacked: bool
    watch_every: int
    lag: int
    seed: int
    process_group: ProcessGroup | None
    verbose: bool


def _check(model: object, blueprints: object, options: _Options) -> None:
    if not isinstance(model, nn.Module):
        raise BridgeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise BridgeError(
            "model has lazy layers whose shapes are not known yet; call it once on a batch before "
            "grow()"
        )
    if blueprints is not None and not isinstance(blueprints, Mapping):
        raise BridgeError(
            f"blueprints must be a dict of name to blueprint, got {type(blueprints).__name__}; say "
            "blueprints={'low_rank': ef.blueprints.low_rank()}"
        )
    for name, blueprint in (blueprints or {}).items():
        if not isinstance(name, str) or not isinstance(blueprint, Blueprint):
            raise BridgeError(
                f"blueprints[{name!r}] must be a blueprint under a name, got "
                f"{type(blueprint).__name__}; make one by calling a function of ef.blueprints, as "
                "{'low_rank': ef.blueprints.low_rank(rank=8)}"
            )
    for name in ("watch_every", "lag"):
        count = getattr(options, name)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise BridgeError(f"{name} must be an int, at least 0, got {count!r}")
    for name in ("freeze_host", "stacked", "verbose"):
        flag = getattr(options, name)
        if not isinstance(flag, bool):
            raise BridgeError(f"{name} must be True or False, got {flag!r}")


def _assemble(
    model: nn.Module, matches: Sequence[Match], growth: ef.Growth, options: _Options
) -> Bridge:
    """Changes the model; what can fail comes first."""
    bank_slots = _bank_slots(growth.layout)
    lifecycle = Lifecycle(growth, options.seed)
    empty = lifecycle.empty_adapters()
    if options.freeze_host:
        model.requires_grad_(False)
        model.zero_grad()  # an optimiser moves whatever has a gradient, frozen or not
    shared = Shared(lifecycle, refresh_copy)
    seeds = [
        _seeds(match, site, empty[site.name], shared, slots, options.stacked, model)
        for match, site, slots in zip(matches, growth.layout.sites, bank_slots, strict=True)
    ]
    seeds[0].add_record()
    hooks = [
        model.register_forward_pre_hook(shared.begin, prepend=True),
        model.register_forward_hook(shared.end, always_call=True),
        model.register_load_state_dict_pre_hook(_load.prepare),
    ]
    for match, own in zip(matches, seeds, strict=True):
        match.module.add_module("seeds", own)
        _compiler.mark(match.module)
        hooks.append(match.module.register_forward_hook(grow_output))
    group = Group(options.process_group)
    return Bridge(
        model, growth, seeds, lifecycle, shared, group, options.watch_every, options.lag, hooks
    )


def _bank_slots(layout: Layout) -> list[tuple[BankSlots, ...]]:
    """The banks of each site.

    Raises:
      BridgeError: a blueprint has no torch form.
    """
    starts = np.cumsum([0, *(site.num_seeds for site in layout.sites)]).tolist()
    slots: list[list[BankSlots]] = [[] for _ in layout.sites]
    for bank in layout.tables.banks:
        blueprint, site = layout.blueprints[bank.blueprint], layout.sites[bank.site]
        form: Form = form_of(blueprint, site.spec)
        name, first_seed = layout.names[bank.blueprint], starts[bank.site]
        slots[bank.site].append(BankSlots(name, bank.start, bank.num_slots, first_seed, form))
    return [tuple(banks) for banks in slots]


_IMAGES = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)


def _sites(
    matches: Sequence[Match],
    chunks: int | Mapping[str, int] | None,
    topology: Topology | Mapping[str, Topology] | None,
) -> list[Site]:
    topologies = by_pattern(topology, matches, "topology", None)
    most = 16 if chunks is None else chunks
    counts = by_pattern(most, matches, "chunks", 1)
    widest = max(match.features for match in matches)
    if chunks is None or (isinstance(most, int) and most <= widest):
        counts = [min(count, match.features) for count, match in zip(counts, matches, strict=True)]
    sites = []
    for match, count, chosen in zip(matches, counts, topologies, strict=True):
        is_image = match.axis == 1 and isinstance(match.module, _IMAGES)
        sites.append(
            ef.site(
                match.name,
                features=match.features,
                chunks=count,
                topology=chosen or ("image" if is_image else "vector"),
            )
        )
    return sites


def _seeds(
    match: Match,
    site: Site,
    empty: Empty,
    shared: Shared,
    bank_slots: tuple[BankSlots, ...],
    is_stacked: bool,
    model: nn.Module,
) -> Seeds:
    like = next(
        (p for p in (*match.module.parameters(), *model.parameters()) if p.is_floating_point()),
        torch.zeros(()),
    )
    banks: dict[str, list[dict[str, Tensor]]] = {}
    for name, leaves in empty.items():
        num_slots = next((len(leaf) for leaf in leaves.values()), 0)
        slots = [
            # Not `.to(like)`: the adapters of a quantised layer would be quantised.
            {
                leaf: torch.tensor(rows[slot], device=like.device, dtype=like.dtype)
                for leaf, rows in leaves.items()
            }
            for slot in range(num_slots)
        ]
        banks[name] = slots or [{}]
    plan = SitePlan.dormant(Chunking(site.features, site.chunks), site.topology)
    own = Seeds(site.name, match.axis, plan, banks, shared, bank_slots, is_stacked=is_stacked)
    return own.to(like.device)
