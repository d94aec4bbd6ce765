"""Whether a blueprint keeps the contract."""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import esper_kernels.jax as kernels
from esper_fn._arguments import check_kind, describe
from esper_fn._typing import Array, Params
from esper_fn.blueprints._base import TOPOLOGIES, AdapterSpec, Blueprint, Cost, Topology
from esper_kernels import Adapter

_SHAPES: dict[Topology, tuple[int, ...]] = {
    "vector": (3,),
    "sequence": (2, 5),
    "image": (2, 4, 3),
}


def check(blueprint: Blueprint, *, features: int = 6) -> None:
    """Runs a blueprint at every topology it claims and raises where it breaks its contract.

    Parameters and output must have the right shapes and dtypes, in float32 and bfloat16. A newborn
    must be the identity, and some parameter must receive a gradient. The stated cost must count the
    real parameters. `init_along` must make the same leaves, the identity as well, and without any
    direction exactly what `init` makes. `apply` must have the form that `activation` names.

    Args:
      blueprint: any one.
      features: of the chunk it is tried on.

    Raises:
      TypeError: it is no `Blueprint`.
      ValueError: it breaks the contract; the message names the topology and says how.

    >>> from esper_fn import blueprints
    >>> check(blueprints.low_rank(rank=2))
    """
    check_kind("blueprint", blueprint, Blueprint, "call its factory: `low_rank(rank=8)`")
    _check_signatures(blueprint)
    unknown = set(blueprint.topologies) - set(TOPOLOGIES)
    if unknown or not blueprint.topologies:
        raise ValueError(
            f"blueprint {blueprint.name!r}: topologies must be some of {TOPOLOGIES}, "
            f"got {blueprint.topologies!r}"
        )
    for topology in blueprint.topologies:
        across = features + 2 if blueprint.can_span else features
        for check_one in (_check_one, _check_along, _check_activation):
            check_one(blueprint, AdapterSpec(features, features, topology), jnp.float32)
            check_one(blueprint, AdapterSpec(features, across, topology), jnp.bfloat16)


_CALLS = {
    "init": "init(key, spec, dtype)",
    "apply": "apply(params, x, spec, mask)",
    "cost": "cost(spec, positions)",
    "init_along": "init_along(key, spec, dtype, directions)",
}


def _check_signatures(blueprint: Blueprint) -> None:
    for name, call in _CALLS.items():
        function = getattr(blueprint, name)
        if function is None and name == "init_along":
            continue
        if not callable(function):
            raise ValueError(
                f"blueprint {blueprint.name!r}: {name} must be a function called as `{call}`, got "
                f"{describe(function)}"
            )
        try:
            signature = inspect.signature(function)
        except ValueError:  # a builtin without one
            continue
        try:
            signature.bind(*range(call.count(",") + 1))
        except TypeError as error:
            raise ValueError(
                f"blueprint {blueprint.name!r}: {name} is called as `{call}`, its signature is "
                f"{name}{signature} ({error}); give it these arguments, in this order"
            ) from None


def _fail(blueprint: Blueprint, case: str, finding: str) -> None:
    raise ValueError(f"blueprint {blueprint.name!r} on {case}: {finding}")


def _check_one(blueprint: Blueprint, spec: AdapterSpec, dtype: jnp.dtype | type) -> None:
    dtype_name = jnp.dtype(dtype).name
    fail = partial(_fail, blueprint, f"{spec.topology} {dtype_name}")

    def output(params: Params, x: Array) -> Array:
        return blueprint.apply(params, x, spec, jnp.ones((spec.inputs,), bool))

    @jax.jit
    def at_birth(params: Params, x: Array, dy: Array) -> tuple[Array, Params]:
        r, pull = jax.vjp(lambda params: output(params, x), params)
        return r, pull(dy)

    rng = np.random.default_rng(0)
    shape = (*_SHAPES[spec.topology], spec.outputs)
    x = jnp.asarray(rng.standard_normal((*shape[:-1], spec.inputs)), dtype)
    params = blueprint.init(jax.random.key(0), spec, dtype)
    leaves = jax.tree.leaves(params)
    if not all(hasattr(leaf, "dtype") for leaf in leaves):
        fail(f"init must return a tree of arrays, got {describe(params)} with other leaves")
    if any(leaf.dtype != dtype for leaf in leaves):
        dtypes = sorted({leaf.dtype.name for leaf in leaves})
        fail(f"init must make {dtype_name} parameters, got {dtypes}")
    r = jax.eval_shape(output, params, x)
    if not hasattr(r, "shape"):
        fail(f"apply must return one array, got {describe(r)}")
    if r.shape != shape or r.dtype != dtype:
        fail(f"apply must return {shape} {dtype_name}, got {r.shape} {r.dtype}")
    wide = jax.eval_shape(output, blueprint.init(jax.random.key(0), spec, jnp.float32), x)
    if wide.dtype != dtype:
        fail(
            f"apply must return the dtype of x, {dtype_name}, whatever the parameters' is, got "
            f"{wide.dtype} with float32 parameters; convert them, `leaf.astype(x.dtype)`"
        )
    r, slopes = at_birth(params, x, jnp.asarray(rng.standard_normal(shape), dtype))
    if not np.all(np.asarray(r) == 0):
        fail("the output at birth must be exactly zero; zero the last matrix in `init`")
    if leaves and not any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(slopes)):
        fail("no parameter gets a gradient at birth: not all factors may start at zero")
    count = sum(leaf.size for leaf in leaves)
    cost = blueprint.cost(spec, 1)
    if not isinstance(cost, Cost):
        fail(f"cost must return `Cost(parameters=..., flops=...)`, got {describe(cost)}")
    stated = cost.parameters
    if stated != count:
        fail(f"cost states {stated} parameters, init makes {count}")


def _check_along(blueprint: Blueprint, spec: AdapterSpec, dtype: jnp.dtype | type) -> None:
    if blueprint.init_along is None:
        return

    fail = partial(_fail, blueprint, f"{spec.topology} {jnp.dtype(dtype).name}")

    @jax.jit
    def output(params: Params, x: Array) -> Array:
        return blueprint.apply(params, x, spec, jnp.ones((spec.inputs,), bool))

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*_SHAPES[spec.topology], spec.inputs)), dtype)
    directions = jnp.asarray(rng.standard_normal((spec.inputs, 2)), jnp.float32)
    key = jax.random.key(0)
    params = blueprint.init(key, spec, dtype)
    directed = blueprint.init_along(jax.random.clone(key), spec, dtype, directions)
    if jax.tree.map(jnp.shape, directed) != jax.tree.map(jnp.shape, params) or any(
        leaf.dtype != dtype for leaf in jax.tree.leaves(directed)
    ):
        fail("init_along must make parameters of the shapes and dtype that init makes")
    if not np.all(np.asarray(output(directed, x)) == 0):
        fail("the output at birth along directions must be exactly zero")
    alike = jax.tree.map(
        lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)),
        blueprint.init_along(jax.random.clone(key), spec, dtype, jnp.zeros_like(directions)),
        params,
    )
    if not jax.tree.all(alike):
        fail("init_along without a direction (all zero) must make exactly what init makes")


def _check_activation(blueprint: Blueprint, spec: AdapterSpec, dtype: jnp.dtype | type) -> None:
    if blueprint.activation is None or spec.inputs != spec.outputs or dtype != jnp.float32:
        return

    fail = partial(_fail, blueprint, spec.topology)

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype),
        blueprint.init(jax.random.key(0), spec, dtype),
    )
    if not isinstance(params, dict) or not {"down", "up"} <= set(params) <= set(Adapter._fields):
        fail(
            f"with activation={blueprint.activation!r} its parameters must be a dict of `down`, "
            f"`up` and, where it has them, `bias` and `gate`, got {jax.tree.structure(params)}"
        )
    x = jnp.asarray(rng.standard_normal((*_SHAPES[spec.topology], spec.inputs)), dtype)
    rows = x.reshape(-1, spec.inputs)
    y, _ = kernels.graft(
        rows,
        Adapter(**{name: leaf[None] for name, leaf in params.items()}),
        jnp.zeros((1,), jnp.int32),
        jnp.asarray([[1.0, 1.0, 1.0, 0.0]], jnp.float32),  # acts, and is not damped
        activation=blueprint.activation,
        implementation="reference",
    )
    r = blueprint.apply(params, x, spec, jnp.ones((spec.inputs,), bool)).reshape(rows.shape)
    if not np.allclose(y - rows, r, rtol=1e-4, atol=1e-4):
        fail(
            f"apply is not the form that activation={blueprint.activation!r} names; see "
            "`esper_fn.blueprints.Blueprint`, or leave it None"
        )
