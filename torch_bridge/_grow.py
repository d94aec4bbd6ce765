"""Putting seeds into a torch model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import esper_fn as ef
from esper_fn.base import Topology
from esper_kernels import NUM_GAINS, Chunking
from torch_bridge import _load
from torch_bridge._adapters import form_of
from torch_bridge._banks import banks_of, tell_copy
from torch_bridge._bridge import Bridge
from torch_bridge._convert._devices import cpu_device
from torch_bridge._distributed import Group
from torch_bridge._errors import BridgeError
from torch_bridge._lifecycle import Lifecycle
from torch_bridge._plan import BankSlots, SitePlan
from torch_bridge._shared import Shared
from torch_bridge._site import Seeds
from torch_bridge._targets import Place, Targets, by_pattern, find


def grow(
    model: nn.Module,
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    chunks: int | Mapping[str, int] | None = None,
    blueprints: Mapping[str, ef.base.Blueprint] | None = None,
    capacity: int = 16,
    policy: Any = None,
    graft: Any = None,
    governor: Any = None,
    settings: Any = None,
    max_ablations: int | None = None,
    directed_births: int = 0,
    features: Mapping[str, int] | None = None,
    topology: Topology | Mapping[str, Topology] | None = None,
    freeze_host: bool = False,
    stacked: bool = False,
    watch_every: int = 16,
    lag: int = 0,
    seed: int = 0,
    process_group: Any = None,
    verbose: bool = True,
) -> Bridge:
    """Puts seeds after some modules of a model, so that it grows while it trains.

    The model keeps its class, its attributes, its parameters' names and its forward; each target
    gets a child module `seeds` with the adapters' parameters, and a forward hook. While nothing
    lives, outputs and gradients are the bare model's, bit for bit. Make the optimiser afterwards.

    Args:
      model: any `nn.Module`; changed in place.
      targets: whose outputs grow: `"all-linear"`, a module's name or the end of one (`"fc1"`), a
        regular expression for a whole name (`blocks("h")` for every block of the list `h`), a
        module class, a function of `(name, module)`, or a sequence of these. A target returns a
        tensor, or a tuple that begins with one. `"all-linear"` leaves out the output head, routers
        of experts, and layers that their parents read instead of calling them (to grow such a layer
        all the same, name it), and modules under several names, which nothing can grow.
      exclude: what `targets` shall not take, said in the same words; a module's name stands for all
        that is inside of it, too.
      chunks: seeds along the feature axis, 16 if left out. A number counts for all targets, and
        those with fewer features have one seed a feature; a mapping says it by pattern, exactly.
      blueprints: what may grow, by name; `{"low_rank": ef.blueprints.low_rank()}` if left out.
      capacity: adapters alive at once, for each target and blueprint.
      policy: as in `esper_fn.Growth`, and so are `graft`, `governor`, `settings`,
        `max_ablations` and `directed_births`.
      graft: see there.
      governor: see there.
      settings: see there.
      max_ablations: see there.
      directed_births: see there.
      features: widths of the last axis by pattern, for targets whose class does not tell.
      topology: `vector`, `sequence` or `image`, for all or by pattern; by itself, convolutions are
        images and everything else is a vector.
      freeze_host: takes `requires_grad` from the model's own parameters, so that only adapters
        learn. Say it here: whoever freezes all parameters after this call freezes the adapters too.
      stacked: one parameter for each bank tensor, `[P, ...]`, in place of one for each adapter. For
        thousands of live adapters; needs an optimiser that works element by element, whose step
        count adapters of a bank then share.
      watch_every: dormant chunks are measured in every so manieth step; 0 for never. Live ones are
        always.
      lag: training steps by which the lifecycle follows. With 0 `bridge.step` waits for the device;
        with 1 it reads what the step before measured, so that a GPU need not wait for Python:
        every decision then comes one step later. An adapter that breaks reaches nothing meanwhile.
      seed: of everything random in the lifecycle.
      process_group: whose ranks decide together; the default one, if there is any.
      verbose: prints what was found.

    Returns:
      The bridge, whose `step` follows every `optimizer.step()`.

    Raises:
      BridgeError: a target that matches nothing or cannot carry seeds, a blueprint without a form
        in torch; says what to do.
      LayoutError: sites, blueprints and capacity do not fit together.

    >>> import esper_fn as ef
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> bridge = grow(model, targets="0", chunks=2, verbose=False)
    >>> bridge.layout.num_seeds
    2
    """
    cpu_device()  # before the arrays of the layout start JAX wherever it likes
    _check(model, blueprints, watch_every=watch_every, lag=lag)
    for name, flag in {"freeze_host": freeze_host, "stacked": stacked, "verbose": verbose}.items():
        if not isinstance(flag, bool):
            raise BridgeError(f"{name} must be True or False, got {flag!r}")
    places, skipped = find(model, targets, features, exclude)
    sites = _sites(places, chunks, topology)
    growth = ef.Growth(
        sites=sites,
        blueprints=blueprints or {"low_rank": ef.blueprints.low_rank()},
        capacity=capacity,
        policy=policy,
        graft=graft,
        governor=governor,
        settings=settings,
        max_ablations=max_ablations,
        directed_births=directed_births,
    )
    layout = growth.layout
    # Before anything is changed: a blueprint without a torch form must leave the model as it was.
    forms = [
        form_of(layout.blueprints[bank.blueprint], sites[bank.site].spec)
        for bank in layout.tables.banks
    ]
    if freeze_host:
        model.requires_grad_(False)
        model.zero_grad()  # an optimiser moves whatever has a gradient, frozen or not
    lifecycle = Lifecycle(growth, seed)
    empty = lifecycle.empty_adapters()
    shared = Shared(lifecycle, tell_copy)
    starts = np.cumsum([0, *(site.num_seeds for site in sites)])
    slots: list[list[BankSlots]] = [[] for _ in sites]
    for bank, form in zip(layout.tables.banks, forms, strict=True):
        name, first = layout.names[bank.blueprint], int(starts[bank.site])
        slots[bank.site].append(BankSlots(name, bank.start, bank.num_slots, first, form))
    seeds = [
        _seeds(place, site, empty[site.name], shared, tuple(own), stacked, model)
        for place, site, own in zip(places, sites, slots, strict=True)
    ]
    banks = banks_of(seeds)
    for own in seeds:
        kernels = [bank.form.kernel for bank in banks if bank.site is own]
        own.activation = kernels[0] if len(kernels) == 1 else None
    seeds[0].keep_record()
    handles = [
        model.register_forward_pre_hook(shared.begin, prepend=True),
        model.register_forward_hook(shared.end, always_call=True),
        model.register_load_state_dict_pre_hook(_load.prepare),
    ]
    _tell_compiler()
    for place, own in zip(places, seeds, strict=True):
        place.module.add_module("seeds", own)
        handles.append(place.module.register_forward_hook(own.hook))
    bridge = Bridge(
        model,
        growth,
        seeds,
        banks,
        lifecycle,
        shared,
        Group(process_group),
        watch_every,
        lag,
        handles,
    )
    if verbose:
        left_out = "".join(f"  left out by 'all-linear': {n} ({w})\n" for n, w in skipped.items())
        sys.stdout.write(f"{bridge.summary()}\n{left_out}")
    return bridge


def _check(model: object, blueprints: object, **counts: object) -> None:
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
        if not isinstance(name, str) or not isinstance(blueprint, ef.base.Blueprint):
            raise BridgeError(
                f"blueprints[{name!r}] must be a blueprint under a name, got "
                f"{type(blueprint).__name__}; make one by calling a function of ef.blueprints, as "
                "{'low_rank': ef.blueprints.low_rank(rank=8)}"
            )
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise BridgeError(f"{name} must be an int, at least 0, got {value!r}")


def _tell_compiler() -> None:
    """Makes `torch.compile` look at hooks.

    By default it compiles the hooks there are and trusts that none are added: it would go on
    running what it compiled of this model before, or of a bare one of the same class.
    """
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()


def _sites(places: Sequence[Place], chunks: Any, topology: Any) -> list[ef.Site]:
    kinds = by_pattern(topology, places, "topology", None)
    most = 16 if chunks is None else chunks
    counts = by_pattern(most, places, "chunks", 1)
    widest = max(place.features for place in places)
    if chunks is None or (isinstance(most, int) and most <= widest):
        counts = [min(most, place.features) for place in places]
    sites = []
    for place, count, kind in zip(places, counts, kinds, strict=True):
        is_image = place.axis == 1 and isinstance(place.module, _IMAGES)
        sites.append(
            ef.site(
                place.name,
                features=place.features,
                chunks=count,
                topology=kind or ("image" if is_image else "vector"),
            )
        )
    return sites


_IMAGES = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)


def _seeds(
    place: Place,
    site: ef.Site,
    adapters: Mapping[str, Mapping[str, np.ndarray]],
    shared: Shared,
    slots: tuple[BankSlots, ...],
    is_stacked: bool,
    model: nn.Module,
) -> Seeds:
    like = next(
        (p for p in (*place.module.parameters(), *model.parameters()) if p.is_floating_point()),
        torch.zeros(()),
    )
    options = {"device": like.device, "dtype": like.dtype}
    banks: dict[str, list[dict[str, Tensor]]] = {}
    for name, leaves in adapters.items():
        count = next((len(leaf) for leaf in leaves.values()), 0)
        each = [
            # Not `.to(like)`: the adapters of a quantised layer would be quantised.
            {of: torch.tensor(leaf[slot], **options) for of, leaf in leaves.items()}
            for slot in range(count)
        ]
        banks[name] = each or [{}]
    cut = Chunking(site.features, site.chunks)
    plan = SitePlan(
        cut=cut,
        topology=site.topology,
        banks=(),
        gains=torch.zeros((site.chunks, NUM_GAINS)),
        row=torch.full((site.chunks,), -1, dtype=torch.int32),
        is_watching=False,
    )
    own = Seeds(site.name, place.axis, plan, banks, shared, slots, is_stacked=is_stacked)
    return own.to(like.device)
