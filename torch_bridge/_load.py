"""Loading a state dict: all is checked, and fitted to the model, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper_fn.lifecycle import NONE
from torch_bridge import _saved
from torch_bridge._errors import BridgeError
from torch_bridge._lifecycle import Lifecycle
from torch_bridge._record import seal, unseal
from torch_bridge._saved import Saved
from torch_bridge._site import Seeds

StateDict = MutableMapping[str, Any]


def prepare(model: nn.Module, state: StateDict, prefix: str, *rest: Any) -> None:
    """Before a grown model loads a state dict: brings what it says of adapters into the model's
    form.

    There adapters may lie in other slots, in parameters of their own or stacked, and be more than
    the model has room for.

    Args:
      model: the model given to `grow`, or a copy of it.
      state: what it is about to load, changed in place.
      prefix: of the model's own names in it.
      rest: unused.

    Raises:
      BridgeError: it does not fit; nothing has been written.
    """
    del rest
    every = {f"{prefix}{n}.": own for n, own in model.named_modules() if isinstance(own, Seeds)}
    for name, site in every.items():
        if site.record is not None and name + "lifecycle" in state:
            # A part of the model may have been grown by itself, with a lifecycle of its own.
            sites = {n: own for n, own in every.items() if own.shared is site.shared}
            _prepare(model, state, prefix, name, sites)


def _prepare(
    model: nn.Module, state: StateDict, prefix: str, first: str, sites: Mapping[str, Seeds]
) -> None:
    """Prepares the sites that share a lifecycle; `first` is the one that has its record."""
    lifecycle: Lifecycle = sites[first].shared.lifecycle
    packed, age = unseal(state[first + "lifecycle"])
    saved = _saved.parse(packed)
    fitted = _saved.fit(saved, lifecycle.growth, lifecycle.leaves())
    places = {own.site: name for name, own in sites.items()}
    adapters = _adapters(saved, lifecycle, state, places)
    _check_adapters(adapters, sites)
    _check_host(model, state, prefix)
    if fitted.capacity:
        lifecycle.make_room(fitted.capacity)
        fitted = _saved.fit(saved, lifecycle.growth, lifecycle.leaves())
    keys = [name + key for name, own in sites.items() for key, _ in own.named_parameters()]
    if not fitted.is_other and all(key in state for key in keys):
        return
    leaves = dict(zip(lifecycle.leaves(), fitted.leaves, strict=True))
    packed = _saved.write(_saved.describe(lifecycle.growth, leaves, fitted.changes))
    state[first + "lifecycle"] = seal(packed, age)
    for name in sites:
        for key in [key for key in state if key.startswith(name) and key != first + "lifecycle"]:
            del state[key]
    _lay_out(lifecycle, fitted.slots, adapters, sites, places, state)


Adapters = dict[int, tuple[str, str, dict[str, Tensor]]]
"""The site's prefix, the blueprint and the parameters of each saved slot."""


def _adapters(
    saved: Saved, lifecycle: Lifecycle, state: StateDict, places: Mapping[str, str]
) -> Adapters:
    """The adapters that a state dict holds for seeds."""
    before = _saved.layout_of(saved, lifecycle.growth)
    owner, adapters = saved.leaves[".owner"], {}
    for bank in before.tables.banks:
        site, blueprint = _saved.twin_name(before, bank)
        if site not in places:
            continue  # its target has been taken out of the model
        above = f"{places[site]}{blueprint}."
        keys = [key for key in state if key.startswith(above)]
        names = sorted({key.rpartition(".")[2] for key in keys})
        for slot in range(bank.num_slots):
            if owner[bank.start + slot] != NONE:
                rows = {leaf: _row(state, above, leaf, slot) for leaf in names}
                adapters[bank.start + slot] = (places[site], blueprint, rows)
    return adapters


def _row(state: StateDict, above: str, leaf: str, slot: int) -> Any:
    stacked = state.get(above + leaf)
    if isinstance(stacked, Tensor):
        return stacked[slot] if stacked.ndim and slot < len(stacked) else None
    return state.get(f"{above}{slot}.{leaf}")


def _check_adapters(adapters: Adapters, sites: Mapping[str, Seeds]) -> None:
    for name, blueprint, rows in adapters.values():
        own = _now(sites[name], blueprint, 0)
        for leaf in {**own, **rows}:
            shape = getattr(rows.get(leaf), "shape", None)
            if leaf not in own or shape != own[leaf].shape:
                raise BridgeError(
                    f"the state dict's adapters of blueprint {blueprint!r} at {sites[name].site!r} "
                    f"have {leaf} {None if shape is None else tuple(shape)}, the model's "
                    f"{tuple(own[leaf].shape) if leaf in own else None}: grow it with the "
                    "blueprint's options as when it was saved. Nothing was loaded"
                )


def _check_host(model: nn.Module, state: StateDict, prefix: str) -> None:
    """Refuses tensors of the host that do not fit, before any is written."""
    own = [*model.named_parameters(), *model.named_buffers()]
    wrong = [
        f"{name} {tuple(state[prefix + name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own
        if isinstance(loaded := state.get(prefix + name), Tensor)
        and loaded.shape != tensor.shape
        and ".seeds." not in name
        and not (loaded.shape == (1,) and not tensor.shape)  # as torch allows
    ]
    if wrong:
        raise BridgeError(
            f"the state dict does not fit the model: {'; '.join(wrong[:8])}. Nothing was loaded"
        )


def _now(site: Seeds, blueprint: str, slot: int) -> dict[str, Tensor]:
    """The parameters in a slot of the model."""
    names = site.names_of(blueprint)
    return {leaf: site.leaf(blueprint, leaf, slot).detach() for leaf in names}


def _lay_out(
    lifecycle: Lifecycle,
    slots: np.ndarray,
    adapters: Adapters,
    sites: Mapping[str, Seeds],
    places: Mapping[str, str],
    state: StateDict,
) -> None:
    """Writes every slot of the model into the state dict: a saved adapter, or what is there now."""
    layout = lifecycle.growth.layout
    for bank in layout.tables.banks:
        of_site, blueprint = _saved.twin_name(layout, bank)
        if of_site not in places:
            continue
        name = places[of_site]
        site, above = sites[name], f"{name}{blueprint}."
        rows = [
            adapters[old][2] if (old := int(slots[bank.start + slot])) in adapters
            else _now(site, blueprint, slot)
            for slot in range(bank.num_slots)
        ]  # fmt: skip
        for leaf in site.names_of(blueprint):
            if site.is_stacked:
                like = rows[0][leaf]
                state[above + leaf] = torch.stack([row[leaf].to(like) for row in rows])
                continue
            for slot, row in enumerate(rows):
                state[f"{above}{slot}.{leaf}"] = row[leaf]
