"""Whether a blueprint keeps the contract of `esper_fn.base`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esper_fn.base import TOPOLOGIES, Blueprint, BodySpec, Topology

_SHAPES: dict[Topology, tuple[int, ...]] = {
    "vector": (3,),
    "sequence": (2, 5),
    "image": (2, 4, 3),
}


def check(blueprint: Blueprint, *, features: int = 6) -> None:
    """Runs a blueprint at every topology it claims and raises where it breaks its contract.

    Looked at: the parameters' dtype, the output's shape and dtype (float32 and bfloat16), identity
    at birth, that some parameter receives a gradient at birth, and that the stated cost counts the
    real parameters.

    Raises:
      ValueError: naming the blueprint, the topology, and what was found instead.
    """
    unknown = set(blueprint.topologies) - set(TOPOLOGIES)
    if unknown or not blueprint.topologies:
        raise ValueError(
            f"blueprint {blueprint.name!r}: topologies must be some of {TOPOLOGIES}, "
            f"got {blueprint.topologies!r}"
        )
    for topology in blueprint.topologies:
        outputs = (features, features + 2) if blueprint.can_span else (features,)
        for width in outputs:
            for dtype in (jnp.float32, jnp.bfloat16):
                _check_one(blueprint, BodySpec(features, width, topology), dtype)


def _check_one(blueprint: Blueprint, spec: BodySpec, dtype: jnp.dtype | type) -> None:
    asked = jnp.dtype(dtype).name

    def fail(found: str) -> None:
        raise ValueError(f"blueprint {blueprint.name!r} on {spec.topology} {asked}: {found}")

    init_key, x_key, dy_key = jax.random.split(jax.random.key(0), 3)
    params = blueprint.init(init_key, spec, jnp.float32)
    made = jax.tree.leaves(jax.eval_shape(lambda key: blueprint.init(key, spec, dtype), init_key))
    if any(leaf.dtype != dtype for leaf in made):
        fail(f"init must make {asked} parameters, got {sorted({leaf.dtype.name for leaf in made})}")
    x = jax.random.normal(x_key, (*_SHAPES[spec.topology], spec.inputs)).astype(dtype)
    mask = jnp.ones((spec.inputs,), bool)
    r, pull = jax.vjp(lambda body: blueprint.apply(body, x, spec, mask), params)
    shape = (*x.shape[:-1], spec.outputs)
    if r.shape != shape or r.dtype != x.dtype:
        fail(f"apply must return {shape} {x.dtype}, got {r.shape} {r.dtype}")
    if jnp.any(r != 0):
        fail("the output at birth must be exactly zero; zero the last matrix in `init`")
    leaves = jax.tree.leaves(params)
    if leaves:
        (slopes,) = pull(jax.random.normal(dy_key, shape).astype(dtype))
        if not any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(slopes)):
            fail("no parameter gets a gradient at birth: not all factors may start at zero")
    count = sum(leaf.size for leaf in leaves)
    stated = blueprint.cost(spec, 1).parameters
    if stated != count:
        fail(f"cost states {stated} parameters, init makes {count}")
