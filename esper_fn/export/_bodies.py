"""What has grown: the bodies that act, by name and place instead of by slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._growth import Growth, GrowthState
from esper_fn._lattice import Lattice, chunk_mask
from esper_fn._typing import Array, Params
from esper_fn.errors import LatticeError
from esper_fn.lifecycle import Stage, gains


class Body(NamedTuple):
    """One body that acts on its host."""

    seed: int
    site: str
    layer: int
    chunk: int
    blueprint: str
    stage: str
    act: float
    """How much it acts: 1, or alpha while it is grafted in."""
    params: Params


def acting(growth: Growth, state: GrowthState) -> list[Body]:
    """The bodies that act, in the order of their seeds; parameters are NumPy's.

    Bodies that only learn behind the host are no part of the network.
    """
    seeds, bodies = jax.device_get((state.seeds, state.bodies))
    act = np.asarray(gains(jnp.asarray(seeds.stage), jnp.asarray(seeds.alpha)))[:, 0]
    tables = growth.lattice.tables
    found = []
    for seed in np.flatnonzero((seeds.slot >= 0) & (act != 0)).tolist():
        place, layer, chunk = growth.lattice.locate(seed)
        slot = int(seeds.slot[seed])
        bank = next(b for b in tables.banks if b.start <= slot < b.start + b.num_slots)
        name = growth.lattice.names[bank.blueprint]
        at = slot - bank.start
        found.append(
            Body(
                seed=seed,
                site=place.name,
                layer=layer,
                chunk=chunk,
                blueprint=name,
                stage=Stage(int(seeds.stage[seed])).name,
                act=float(act[seed]),
                params=jax.tree.map(lambda leaf, at=at: leaf[at], bodies[place.name][name]),
            )
        )
    return found


class _Placed(NamedTuple):
    """Bodies of one blueprint at one site, `[n, ...]`; a site inside a stack has `[L, n, ...]`."""

    params: Params
    chunk: Array
    act: Array
    """0 where there is no body."""


@jax.tree_util.register_pytree_node_class
class FixedSeeds:
    """Stands in for `Seeds` where what has grown is fixed: no slots, no lifecycle, no state."""

    def __init__(self, lattice: Lattice, placed: dict[str, dict[str, _Placed]]) -> None:
        """See `fixed`."""
        self._lattice, self._placed = lattice, placed

    def tree_flatten(self) -> tuple[tuple[Any], Lattice]:
        """The bodies are the children."""
        return (self._placed,), self._lattice

    @classmethod
    def tree_unflatten(cls, lattice: Lattice, children: tuple[Any]) -> FixedSeeds:
        """The inverse of `tree_flatten`."""
        return cls(lattice, *children)

    def grow(self, name: str, x: Array, *, source: Array | None = None) -> Array:
        """`x + act r` for each body of the site; features beyond the site's are left as they are.

        A host into which bodies were folded may have wider activations than its sites.
        """
        place = self._lattice.sites[self._lattice.site_index(name)]
        read = (x if source is None else source)[..., : place.source.features]
        y = x
        for blueprint_name, placed in self._placed.get(name, {}).items():
            blueprint = self._lattice.blueprints[self._lattice.blueprint_index(blueprint_name)]
            for n in range(placed.chunk.shape[0]):
                body = jax.tree.map(lambda leaf, n=n: leaf[n], placed.params)
                chunk, act = placed.chunk[n], placed.act[n].astype(x.dtype)
                u = _read(read, place.source, chunk)
                mask = jnp.asarray(chunk_mask(place.source))[chunk]
                r = blueprint.apply(body, u, place.spec, mask)
                r = jnp.where(act != 0, act * r, jnp.zeros_like(r))
                columns, is_real = _columns(place.target, chunk)
                columns = jnp.where(is_real, columns, x.shape[-1])
                y = y.at[..., columns].add(r, mode="drop")
        return y

    def layers(self, name: str) -> FixedSeeds:
        """The seeds of a site inside a scanned stack, with a leading axis L to be scanned over."""
        return FixedSeeds(self._lattice, {name: self._placed.get(name, {})})

    def layer(self, name: str, index: int | Array) -> FixedSeeds:
        """The seeds of one layer of a site inside a stack."""
        at_site = jax.tree.map(lambda leaf: leaf[index], self._placed.get(name, {}))
        return FixedSeeds(self._lattice, {name: at_site})


def _columns(chunking: Any, chunk: Array) -> tuple[Array, Array]:
    offsets = jnp.arange(chunking.widest, dtype=jnp.int32)
    return jnp.asarray(chunking.starts)[chunk] + offsets, jnp.asarray(chunk_mask(chunking))[chunk]


def _read(x: Array, chunking: Any, chunk: Array) -> Array:
    columns, is_real = _columns(chunking, chunk)
    columns = jnp.where(is_real, columns, x.shape[-1])
    return jnp.take(x, columns, axis=-1, mode="fill", fill_value=0)


def fixed(lattice: Lattice, bodies: Sequence[Body]) -> FixedSeeds:
    """The bodies as seeds for a forward pass, `host.apply(params, seeds, inputs)`.

    Raises:
      LatticeError: a body of a site or blueprint that the lattice does not have.
    """
    placed: dict[str, dict[str, _Placed]] = {}
    for body in bodies:
        if body.blueprint not in lattice.names or body.site not in [s.name for s in lattice.sites]:
            raise LatticeError(f"the lattice has no {body.blueprint!r} at {body.site!r}")
    for place in lattice.sites:
        for name in lattice.names:
            here = [body for body in bodies if (body.site, body.blueprint) == (place.name, name)]
            if not here:
                continue
            rows = [
                [body for body in here if body.layer == layer] for layer in range(place.num_layers)
            ]
            width = max(map(len, rows))
            layers = [_stacked(row, width, here[0].params) for row in rows]
            stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
            if place.layers is None:
                stack = layers[0]
            placed.setdefault(place.name, {})[name] = stack
    return FixedSeeds(lattice, placed)


def _stacked(bodies: Sequence[Body], width: int, like: Params) -> _Placed:
    nothing = jax.tree.map(jnp.zeros_like, like)
    filled = [body.params for body in bodies] + [nothing] * (width - len(bodies))
    num_free = width - len(bodies)
    return _Placed(
        params=jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *filled),
        chunk=jnp.asarray([body.chunk for body in bodies] + [0] * num_free, jnp.int32),
        act=jnp.asarray([body.act for body in bodies] + [0.0] * num_free, jnp.float32),
    )


def fold(
    host_fold: Any, lattice: Lattice, params: Params, bodies: Sequence[Body]
) -> tuple[Params, list[Body], list[Body]]:
    """Takes fossils into the host's own parameters, where that is the same function.

    Args:
      host_fold: `Host.fold`, or None for a host that cannot.
      lattice: of the run.
      params: of the host.
      bodies: from `acting`.

    Returns:
      Parameters, the bodies that remain beside them, and those that were folded.
    """
    rest, folded = [], []
    for body in bodies:
        blueprint = lattice.blueprints[lattice.blueprint_index(body.blueprint)]
        taken = None
        if host_fold is not None and body.stage == Stage.FOSSILIZED.name:
            taken = host_fold(params, body.site, blueprint, body.params, body.act)
        if taken is None:
            rest.append(body)
        else:
            params = taken
            folded.append(body)
    return params, rest, folded
