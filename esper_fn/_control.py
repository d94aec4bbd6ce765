"""Control flow that works in the buffers of its carry, and inside a `shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from esper_fn._typing import Array, Bool

Carry = TypeVar("Carry")


def once_if(predicate: Bool[Array, ""], run: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """`run(carry)` where the predicate holds, else `carry`: a loop of one round or none.

    `jax.lax.cond` would copy every array that a branch hands on untouched; the carry of a loop
    stays in its buffer. Differentiable in both modes, any number of times: derivatives do go
    through a `cond`.
    """
    carry = vary_as_after(run, carry, predicate)
    leaves, structure = jax.tree.flatten(carry)
    # What `run` closes over becomes an argument: a derivative rule may hold no tracer. Traced
    # twice, as newer JAX keeps what was closed over in the first trace.
    traced = jax.make_jaxpr(run)(carry)
    explicit = jax.make_jaxpr(
        lambda leaves, consts: jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, consts))(*leaves)
    )(leaves, traced.consts)
    chosen = _once_if(_with_consts(explicit), predicate, leaves, traced.consts)
    return jax.tree.unflatten(structure, chosen)


def _with_consts(explicit: ClosedJaxpr) -> Callable[[list[Array], list[Array]], list[Array]]:
    return lambda leaves, consts: list(jaxpr_as_fun(explicit)(*leaves, *consts))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once_if(
    run: Callable[..., list[Array]], predicate: Array, leaves: list[Array], consts: list[Array]
) -> list[Array]:
    def once(state: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        predicate, leaves = state
        return jnp.zeros_like(predicate), run(leaves, consts)

    return jax.lax.while_loop(lambda state: state[0], once, (predicate, leaves))[1]


@_once_if.defjvp
def _once_if_tangent(run: Callable[..., list[Array]], primals: Any, tangents: Any) -> Any:
    predicate, leaves, consts = primals
    _, d_leaves, d_consts = tangents
    is_inexact = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def inexact(tangents: list[Array]) -> list[Array]:
        return [leaf for leaf, is_kept in zip(tangents, is_inexact, strict=True) if is_kept]

    def complete(inexact_tangents: list[Array]) -> list[Any]:
        rest = iter(inexact_tangents)
        return [
            next(rest) if is_kept else np.zeros(jnp.shape(leaf), jax.dtypes.float0)
            for leaf, is_kept in zip(leaves, is_inexact, strict=True)
        ]

    def push(d_inexact: list[Array]) -> list[Array]:
        return inexact(jax.jvp(run, (leaves, consts), (complete(d_inexact), d_consts))[1])

    pushed = jax.lax.cond(predicate, push, lambda d_inexact: d_inexact, inexact(d_leaves))
    return _once_if(run, *primals), complete(pushed)


def cond(
    is_first: Bool[Array, ""],
    first: Callable[..., Carry],
    second: Callable[..., Carry],
    *operands: Any,
) -> Carry:
    """`jax.lax.cond`, whose branches may differ in how they vary inside a `shard_map`."""
    if _is_sharded():
        shapes = [jax.eval_shape(branch, *operands) for branch in (first, second)]
        first, second = _like(first, shapes[1]), _like(second, shapes[0])
    chosen: Carry = jax.lax.cond(is_first, first, second, *operands)
    return chosen


def _like(branch: Callable[..., Carry], other: Carry) -> Callable[..., Carry]:
    return lambda *operands: jax.tree.map(vary_alike, branch(*operands), other)


def vary_as_after(run: Callable[[Carry], Carry], carry: Carry, *like: Any) -> Carry:
    """Inside a `shard_map`, marks a loop's carry as varying where a round of it makes it so."""
    if not _is_sharded():
        return carry
    marked: Carry = jax.tree.map(
        lambda leaf, after: vary_alike(leaf, after, *like), carry, jax.eval_shape(run, carry)
    )
    return marked


def _is_sharded() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def by_compiler(run: Callable[..., Array], like: Array, *operands: Any) -> Array:
    """`run(*operands)`, divided among devices by the compiler; the result is divided as `like` is.

    Over mesh axes of type Explicit JAX would ask how each intermediate is divided.
    """
    mesh = jax.typeof(like).sharding.mesh
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = tuple(name for name, kind in types if kind == jax.sharding.AxisType.Explicit)
    if not names:
        return run(*operands)
    divided: Array = jax.sharding.auto_axes(
        run, axes=names, out_sharding=jax.typeof(like).sharding
    )(*operands)
    return divided


def vary_alike(tree: Any, *like: Any) -> Any:
    """Inside a `shard_map`, marks `tree` as varying where one of `like` does."""
    axes = frozenset[str]().union(*map(_varying_axes, like))

    def cast(leaf: Array) -> Array:
        missing = axes - _varying_axes(leaf)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _varying_axes(x: Any) -> frozenset[str]:
    kind = (x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)).manual_axis_type
    # None where JAX does not track it: `shard_map(check_vma=False)`, `pmap`.
    return frozenset() if kind is None else frozenset(kind.varying)
