"""`graft` in Pallas, lowered by Mosaic GPU for Hopper's matrix units and copy engine; bfloat16.

The kernels leave partial sums of each range of rows; XLA adds them in a fixed order here. They know
no damping: where a damped adapter lives, the reference computes its gradients after them.
"""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp

from esper_kernels._records import Adapter, BackwardStatistics, ForwardStatistics, Gains
from esper_kernels.graft import reference_jax
from esper_kernels.graft._case import Case
from esper_kernels.graft.reference_jax import is_live

Array = jax.Array

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
OLDEST_JAX = (0, 11)
MOST_COLUMNS = 256
MOST_GRADIENT = 4096
"""Entries F * R of an adapter's matrix whose gradient the registers of a warpgroup hold."""


def refuses(case: Case) -> str | None:
    """Tell why this backend cannot serve the case; None if it can."""
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"needs JAX 0.11 or newer, this is {jax.__version__}"
    if not any(name in case.device for name in HOPPER):
        return f"needs an NVIDIA Hopper GPU ({', '.join(HOPPER)}), the device is {case.device}"
    if case.dtype != "bfloat16":
        return f"takes bfloat16 activations, not {case.dtype}: matrix units round float32 to tf32"
    if case.rows == 0 or case.rows % 8:
        return (
            f"takes a positive multiple of 8 rows, as the copy engine's tiles do, not {case.rows}"
        )
    if not case.is_even or case.width % 64 or case.width > MOST_COLUMNS:
        widths = sorted({*case.chunking.sizes.tolist()})
        return f"takes chunks of 64, 128, 192 or 256 features each, not {widths}"
    if case.activation == "gated":
        return "has no gated form"
    from esper_kernels.graft.pallas_mosaic_gpu_parts import padded_rank

    if case.width * padded_rank(case) > MOST_GRADIENT:
        return (
            f"holds an adapter's gradients in registers: F * R is {case.width} * "
            f"{padded_rank(case)} (R padded), it may be {MOST_GRADIENT}"
        )
    return None


def _padded(case: Case, adapter: Adapter, unused: Array) -> tuple[Array, Array, Array]:
    """`down [P, F, R]`, `up [P, R, F]` and the bias [P, R], R padded with zeros.

    Without a bias `unused`, a float32 matrix, stands in its place.
    """
    from esper_kernels.graft.pallas_mosaic_gpu_parts import padded_rank

    more = padded_rank(case) - case.rank
    bias = unused if adapter.bias is None else adapter.bias
    if not more:
        return adapter.down, adapter.up, bias
    down = jnp.pad(adapter.down, ((0, 0), (0, 0), (0, more)))
    up = jnp.pad(adapter.up, ((0, 0), (0, more), (0, 0)))
    return down, up, bias if adapter.bias is None else jnp.pad(bias, ((0, 0), (0, more)))


def _operands(case: Case, adapter: Adapter, unused: Array) -> tuple[Array, Array, Array]:
    """`down^T [P, R, F]`, `up [P, R, F]` in bfloat16 and a float32 bias [P, R], R padded."""
    down, up, bias = _padded(case, adapter, unused)
    down = jnp.swapaxes(down, 1, 2)
    if case.has_bias:
        # As the reference sees it: rounded to the activation's dtype.
        bias = jax.lax.reduce_precision(bias.astype(jnp.float32), 8, 7)
    return down.astype(jnp.bfloat16), up.astype(jnp.bfloat16), bias


def _watched(case: Case, sums: Array, is_measured: Array | None = None) -> Array:
    """[C, 5] from `sums [C, F + 64]` of squares by feature, then of values."""
    square, value = sums[:, : case.width], sums[:, case.width :]
    zero = jnp.zeros((), jnp.float32)
    shares = (
        jnp.pad(value, ((0, 0), (0, case.width - value.shape[1]))),
        square,
        (square == 0).astype(jnp.float32),
    )
    # All three in one reduction: alone, each would be a kernel.
    total, square, dead = jax.lax.reduce(shares, (zero,) * 3, _add_each, (1,))
    columns = [
        jnp.full_like(total, case.rows * case.width),
        total,
        square,
        jnp.full_like(total, case.width),
        dead,
    ]
    watched = jnp.stack(columns, axis=1)
    return watched if is_measured is None else jnp.where(is_measured[:, None], watched, 0.0)


def _add_each(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(jnp.add, left, right))


def forward(
    case: Case, x: Array, adapter: Adapter, slot: Array, gains: Array
) -> tuple[Array, Array]:
    """Return `y` and `watched`; see the README beside this file."""
    from esper_kernels.graft.pallas_mosaic_gpu_forward import forward_kernel

    y, sums = forward_kernel(case)(x, *_padded(case, adapter, gains), slot, gains)
    return y, _watched(case, _add_up(sums))


def _add_up(sums: Array) -> Array:
    """The sum over a short first axis, written out so that XLA joins it to what reads it."""
    return reduce(jnp.add, [sums[k] for k in range(sums.shape[0])])


def forward_in_place(
    case: Case, x: Array, adapter: Adapter, slot: Array, gains: Array
) -> tuple[Array, Array]:
    """Do the same in the memory of `x`, with `watched` for live chunks only.

    Donate `x`, or let nothing use it afterwards: else XLA copies it first.
    """
    from esper_kernels.graft.pallas_mosaic_gpu_forward import in_place_kernel
    from esper_kernels.graft.pallas_mosaic_gpu_parts import forward_share, gather_sums, live_words

    ref, words = jax.new_ref(x), live_words(is_live(case, slot, gains))
    sums, where = in_place_kernel(case)(ref, *_padded(case, adapter, gains), slot, gains, words)
    (sums,) = gather_sums(forward_share(case), where, sums)
    return jax.freeze(ref), _watched(case, sums, where[:, 0] >= 0)


def backward(
    case: Case, x: Array, dy: Array, adapter: Adapter, slot: Array, gains: Array, watched: Array
) -> tuple[Array, Adapter, Array]:
    """Return `dx`, the adapter's gradients and `channels`; see the README beside this file."""
    from esper_kernels.graft.pallas_mosaic_gpu_backward import backward_kernel

    dx, *partial_sums = backward_kernel(case)(x, dy, *_operands(case, adapter, gains), slot, gains)
    sums = [jnp.sum(ranges, axis=0) for ranges in partial_sums]
    undamped = _gradients(case, adapter, slot, gains, watched, sums)
    return dx, *_damp(case, x, dx, adapter, slot, gains, watched, undamped)


def backward_in_place(
    case: Case, x: Array, dy: Array, adapter: Adapter, slot: Array, gains: Array, watched: Array
) -> tuple[Array, Adapter, Array]:
    """Do the same in the memory of `dy`, with `channels` for live chunks only.

    Donate `dy`, or let nothing use it afterwards: else XLA copies it first.
    """
    from esper_kernels.graft.pallas_mosaic_gpu_backward import backward_kernel
    from esper_kernels.graft.pallas_mosaic_gpu_parts import backward_share, gather_sums, live_words

    share, ref = backward_share(case), jax.new_ref(dy)
    kernel, words = backward_kernel(case, share=share), live_words(is_live(case, slot, gains))
    *partial_sums, where = kernel(x, ref, *_operands(case, adapter, gains), slot, gains, words)
    sums, dx = gather_sums(share, where, *partial_sums), jax.freeze(ref)
    undamped = _gradients(case, adapter, slot, gains, watched, sums)
    return dx, *_damp(case, x, dx, adapter, slot, gains, watched, undamped)


def _damp(
    case: Case,
    x: Array,
    dx: Array,
    adapter: Adapter,
    slot: Array,
    gains: Array,
    watched: Array,
    undamped: tuple[Adapter, Array],
) -> tuple[Adapter, Array]:
    """The adapter's gradients and `channels`; where damped adapters live, by the reference.

    Their `input_grad_scale` is 0, so `dx` is `dy` there. All else keeps its bits.
    """
    named = Gains.from_columns(gains)
    is_damped = (
        is_live(case, slot, gains)
        & (named.output_damping != 0)
        & (named.param_grad_scale != 0)
        & (named.input_grad_scale == 0)
    )

    def damp(undamped: tuple[Adapter, Array]) -> tuple[Adapter, Array]:
        d_adapter, channels = undamped
        theirs = jnp.where(is_damped[:, None], gains, 0.0)
        _, damped, measured = reference_jax.backward(case, x, dx, adapter, slot, theirs, watched)
        slots = jnp.where(is_damped, slot, case.slots)
        is_theirs = jnp.zeros((case.slots,), bool).at[slots].set(True, mode="drop")

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(is_theirs.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        errors = jnp.where(is_damped, measured[:, 4], channels[:, 4])
        return jax.tree.map(choose, damped, d_adapter), channels.at[:, 4].set(errors)

    return jax.lax.cond(jnp.any(is_damped), damp, lambda undamped: undamped, undamped)


def _gradients(
    case: Case, adapter: Adapter, slot: Array, gains: Array, watched: Array, summed: list[Array]
) -> tuple[Adapter, Array]:
    """The adapter's gradients and `channels`.

    `summed` is `[C, 2, F, R]`, `[C, 4, 64]` and `[C, R]`: what `backward_kernel` leaves, summed.
    """
    grads, sums, bias = summed
    bias, sums = bias[:, : case.rank], jnp.sum(sums, axis=2)
    live = is_live(case, slot, gains)
    is_sound = jnp.isfinite(sums[:, 1])
    is_flowing = is_sound & jnp.isfinite(sums[:, 3]) & jnp.all(jnp.isfinite(grads), axis=(1, 2, 3))
    if case.has_bias:
        is_flowing &= jnp.all(jnp.isfinite(bias), axis=1)
    is_input_finite = jnp.isfinite(sums[:, 0]) & jnp.isfinite(ForwardStatistics(*watched.T).square)
    channels = BackwardStatistics(
        gradient_square=sums[:, 0],
        num_live=live.astype(jnp.float32),
        output_square=jnp.where(live & is_sound, sums[:, 1], 0.0),
        utility=jnp.where(live & is_sound, -sums[:, 2], 0.0),
        num_errors=(live & is_input_finite & ~is_flowing).astype(jnp.float32),
    )

    scale = Gains.from_columns(gains).param_grad_scale
    learns = live & is_flowing & (scale != 0)
    rows = jnp.where(learns, slot, case.slots)
    chunks = jnp.arange(case.chunks, dtype=jnp.int32)
    nobody = jnp.full((case.slots,), case.chunks, jnp.int32)
    chunk = nobody.at[rows].set(chunks, mode="drop")
    is_serving, chunk = chunk < case.chunks, jnp.minimum(chunk, case.chunks - 1)
    scale = scale[chunk]

    def gradient(leaf: Array, like: Array) -> Array:
        shape = (-1, *(1,) * (leaf.ndim - 1))
        share = jnp.where(is_serving.reshape(shape), leaf[chunk] * scale.reshape(shape), 0.0)
        return share.astype(like.dtype)

    d_adapter = Adapter(
        down=gradient(grads[:, 0, :, : case.rank], adapter.down),
        up=jnp.swapaxes(gradient(grads[:, 1, :, : case.rank], adapter.up), 1, 2),
        bias=None if adapter.bias is None else gradient(bias, adapter.bias),
    )
    return d_adapter, jnp.stack(channels, axis=1)
