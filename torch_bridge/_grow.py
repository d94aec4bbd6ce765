"""Putting seeds into a torch model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

import esper_fn as ef
from esper_fn.blueprints import Blueprint, Topology
from esper_fn.types import Site
from esper_kernels import Chunking
from torch_bridge import _compiler, _load
from torch_bridge._banks import refresh_copy
from torch_bridge._bridge import Bridge
from torch_bridge._convert._devices import cpu_device
from torch_bridge._distributed import Group
from torch_bridge._errors import BridgeError
from torch_bridge._forward import grow_output
from torch_bridge._lifecycle import Lifecycle
from torch_bridge._plan import SitePlan, bank_slots
from torch_bridge._shared import Shared
from torch_bridge._site import Seeds
from torch_bridge._targets import Match, Targets, by_pattern, find


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
      The bridge, whose `step` follows every `optimizer.step()`; make that, and compile, afterwards.

    Raises:
      BridgeError: a target matches nothing or cannot carry seeds, a blueprint has no torch form.
      LayoutError, TypeError: sites, blueprints and capacity do not fit together, or are none.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> grow(model, targets="0", chunks=2, verbose=False).layout.num_seeds
    2
    """
    counts = {"watch_every": watch_every, "lag": lag}
    _check(model, counts, {"freeze_host": freeze_host, "stacked": stacked, "verbose": verbose})
    matches, skipped = find(model, targets, features, exclude)
    sites = _sites(matches, chunks, topology)
    blueprints = blueprints or {"low_rank": ef.blueprints.low_rank()}
    static = ef.Growth(sites=sites, blueprints=blueprints, capacity=capacity, **growth)
    shared = Shared(Lifecycle(static, seed), refresh_copy)
    seeds, hooks = _insert(model, matches, shared, freeze_host=freeze_host, is_stacked=stacked)
    bridge = Bridge(model, seeds, shared, Group(process_group), hooks, **counts)
    return _reported(bridge, skipped) if verbose else bridge


def _reported(bridge: Bridge, skipped: Mapping[str, str]) -> Bridge:
    """Prints what was found."""
    left_out = [f"  left out by 'all-linear': {name} ({why})\n" for name, why in skipped.items()]
    sys.stdout.write(f"{bridge.summary()}\n{''.join(left_out)}")
    return bridge


def _check(model: object, counts: Mapping[str, object], flags: Mapping[str, object]) -> None:
    if not isinstance(model, nn.Module):
        raise BridgeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise BridgeError(
            "model has lazy layers whose shapes are not known yet; call it once on a batch before "
            "grow()"
        )
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise BridgeError(f"{name} must be an int, at least 0, got {count!r}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise BridgeError(f"{name} must be True or False, got {flag!r}")


def _insert(
    model: nn.Module,
    matches: Sequence[Match],
    shared: Shared,
    *,
    freeze_host: bool,
    is_stacked: bool,
) -> tuple[list[Seeds], list[RemovableHandle]]:
    """Changes the model, after all that can fail; returns its sites and hooks."""
    layout, empty = shared.lifecycle.growth.layout, shared.lifecycle.empty_adapters()
    slots = bank_slots(layout)
    if freeze_host:
        model.requires_grad_(False)
        model.zero_grad()  # an optimiser moves whatever has a gradient, frozen or not
    hooks = [
        model.register_forward_pre_hook(shared.begin, prepend=True),
        model.register_forward_hook(shared.end, always_call=True),
        model.register_load_state_dict_pre_hook(_load.prepare),
    ]
    sites = []
    for match, site in zip(matches, layout.sites, strict=True):
        like = next(
            (p for p in (*match.module.parameters(), *model.parameters()) if p.is_floating_point()),
            torch.zeros(()),
        )
        banks = {
            name: {
                # Not `.to(like)`: the adapters of a quantised layer would be quantised.
                leaf: torch.tensor(rows, device=like.device, dtype=like.dtype)
                for leaf, rows in leaves.items()
            }
            for name, leaves in empty[site.name].items()
        }
        plan = SitePlan.dormant(Chunking(site.features, site.chunks), site.topology)
        seeds = Seeds(
            site.name, match.axis, plan, banks, shared, slots[site.name], is_stacked=is_stacked
        ).to(like.device)
        sites.append(seeds)
    sites[0].add_record()
    for match, seeds in zip(matches, sites, strict=True):
        match.module.add_module("seeds", seeds)
        _compiler.mark(match.module)
        hooks.append(match.module.register_forward_hook(grow_output))
    return sites, hooks


_IMAGES = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)


def _sites(
    matches: Sequence[Match],
    chunks: int | Mapping[str, int] | None,
    topology: Topology | Mapping[str, Topology] | None,
) -> list[Site]:
    cpu_device()  # before the arrays of the layout start JAX wherever it likes
    modules = {match.name: match.module for match in matches}
    topologies = by_pattern(topology, modules, "topology", None)
    most = 16 if chunks is None else chunks
    counts = by_pattern(most, modules, "chunks", 1)
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
