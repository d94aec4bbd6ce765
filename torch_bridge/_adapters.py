"""The adapters of the blueprints in torch, many at once.

Every function takes parameters with a leading axis of n adapters and an input `u` of `[n, ..., F]`,
and computes in the dtype of `u`. `form_of` chooses the one that computes what a blueprint computes
in JAX, and tries it out before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from esper_fn.blueprints import AdapterSpec, Blueprint, Topology
from esper_kernels.rule_torch import Leaves
from torch_bridge._convert._devices import cpu_device
from torch_bridge._errors import BridgeError

Apply: TypeAlias = Callable[[Leaves, Tensor, Tensor, Topology], Tensor]
"""`(parameters [n, ...], u [n, ..., F], mask [n, F], topology) -> r [n, ..., G]`."""

Activation: TypeAlias = Callable[[Tensor], Tensor]
PHI: dict[str, Activation] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def activation_gradient(name: str, z: Tensor, a: Tensor, d_a: Tensor) -> Tensor:
    """`d_a * phi'(z)` of one of `PHI`, where `a = phi(z)`."""
    if name == "none":
        return d_a
    if name == "relu":
        return torch.ops.aten.threshold_backward(d_a, a, 0)
    if name == "silu":
        return torch.ops.aten.silu_backward(d_a, z)
    return torch.ops.aten.gelu_backward(d_a, z, approximate="tanh")


def project_down(leaves: Leaves, rows: Tensor) -> Tensor:
    """`rows down + bias` of `[n, N, F]`, in its dtype; without bias where there is none."""
    bias = leaves.get("bias")
    down = leaves["down"].to(rows.dtype)
    if bias is None:
        return torch.bmm(rows, down)
    return torch.baddbmm(bias.to(rows.dtype)[:, None, :], rows, down)


def pull_dense(
    activation: str, leaves: Leaves, up: Tensor, rows: Tensor, z: Tensor, a: Tensor, dr: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the parameters and of `rows`, where `r = a up` and `a = phi(z)`."""
    d_z = activation_gradient(activation, z, a, torch.bmm(dr, up.mT))
    gradients = {"down": torch.bmm(rows.mT, d_z), "up": torch.bmm(a.mT, dr)}
    if "bias" in leaves:
        gradients["bias"] = d_z.sum(1)
    return gradients, torch.bmm(d_z, leaves["down"].to(rows.dtype).mT)


class Form(NamedTuple):
    """A blueprint in torch."""

    apply: Apply
    activation: str | None
    """Names `phi` where the adapter is `phi(u down + bias) up`, whose derivative is written out."""
    kernel: str | None = None
    """What `esper_kernels` calls it, where it can compute it."""


def _rows(u: Tensor) -> Tensor:
    return u.reshape(u.shape[0], -1, u.shape[-1])


def _matmul(u: Tensor, matrix: Tensor) -> Tensor:
    """`[n, ..., F] @ [n, F, R]`."""
    r = torch.bmm(_rows(u), matrix.to(u.dtype))
    return r.reshape(*u.shape[:-1], matrix.shape[-1])


def _along(values: Tensor, u: Tensor) -> Tensor:
    """`[n, F]` shaped to broadcast against `[n, ..., F]`."""
    return values.to(u.dtype).reshape(values.shape[0], *(1,) * (u.ndim - 2), -1)


def _noop(p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del p, mask, topology
    return torch.zeros_like(u)


def _scale_shift(p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del mask, topology
    return u * _along(p["scale"], u) + _along(p["shift"], u)


def _dense(phi: Activation, p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del mask, topology
    z = _matmul(u, p["down"])
    if "bias" in p:
        z = z + _along(p["bias"], z)
    return _matmul(phi(z), p["up"])


def _paired(phi: Activation, p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del mask, topology
    half = p["up"].shape[1] // 2
    down, bias, up = p["down"], p["bias"], p["up"]
    z = _matmul(u, down[..., :half]) + _along(bias[:, :half], u[..., :1])
    gap = bias[:, half:] - bias[:, :half]
    dz = _matmul(u, down[..., half:] - down[..., :half]) + _along(gap, u[..., :1])
    high = phi(z + dz)
    rise = torch.where(dz == 0, torch.zeros_like(z), high - phi(z))
    return _matmul(high, up[:, :half] + up[:, half:]) - _matmul(rise, up[:, :half])


def _gated(p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del mask, topology
    return _matmul(F.silu(_matmul(u, p["gate"])) * _matmul(u, p["down"]), p["up"])


def _normalised(p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del topology
    real = mask.reshape(mask.shape[0], *(1,) * (u.ndim - 2), -1)
    count = real.sum(-1, keepdim=True, dtype=torch.float32)
    wide = u.float()
    mean = wide.sum(-1, keepdim=True) / count
    centred = torch.where(real, wide - mean, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    normal = (centred * torch.rsqrt(variance + 1e-5)).to(u.dtype)
    return _dense(PHI["gelu"], p, normal, mask, "vector")


def _squeeze_excite(p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del mask
    wide = u.float()
    if topology == "image":
        pooled = wide.mean((-3, -2), keepdim=True)
    else:
        seen = torch.arange(1, u.shape[-2] + 1, dtype=torch.float32, device=u.device)
        pooled = wide.cumsum(-2) / seen[:, None]
    inner = torch.relu(_matmul(pooled.to(u.dtype), p["down"]))
    return u * (2 * torch.sigmoid(_matmul(inner, p["up"])) - 1)


def _shifted(u: Tensor, window: Sequence[int]) -> list[Tensor]:
    """What each place of a window sees, causal over one axis and centred over two."""
    axes = len(window)
    before = [size - 1 if axes == 1 else (size - 1) // 2 for size in window]
    edges: list[int] = []
    for b, size in zip(reversed(before), reversed(window), strict=True):
        edges += [b, size - 1 - b]
    padded = F.pad(u, [0, 0, *edges])
    lengths = u.shape[-axes - 1 : -1]
    return [
        padded[
            (..., *(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True)), slice(None))
        ]
        for offsets in np.ndindex(*window)
    ]


def _depthwise(p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del mask, topology
    kernel = p["kernel"].to(u.dtype).float()
    window = kernel.shape[1:-2]
    filters = kernel.reshape(kernel.shape[0], -1, kernel.shape[-1])
    y = torch.zeros_like(u, dtype=torch.float32)
    for index, part in enumerate(_shifted(u, window)):
        y = y + part.float() * _along(filters[:, index], part.float())
    return y.to(u.dtype)


def _bottleneck_conv(p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del mask, topology
    kernel = p["kernel"]
    inner = _matmul(u, p["down"])
    seen = torch.cat(_shifted(inner, kernel.shape[1:-2]), dim=-1)
    flat = kernel.reshape(kernel.shape[0], -1, kernel.shape[-1])
    return _matmul(torch.relu(_matmul(seen, flat)), p["up"])


def _attention(is_causal: bool, p: Leaves, u: Tensor, mask: Tensor, topology: Topology) -> Tensor:
    del mask
    is_image = topology == "image"
    rows = u.reshape(*u.shape[:-3], -1, u.shape[-1]) if is_image else u
    query, key, value = _matmul(rows, p["qkv"]).chunk(3, dim=-1)
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if is_causal and not is_image:
        length = rows.shape[-2]
        seen = torch.ones((length, length), dtype=torch.bool, device=u.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    mixed = torch.softmax(scores, dim=-1).to(u.dtype) @ value
    return _matmul(mixed, p["up"]).reshape(u.shape)


_FORMS: dict[str, tuple[Apply, ...]] = {
    "noop": (_noop,),
    "scale_shift": (_scale_shift,),
    "gated": (_gated,),
    "normalised": (_normalised,),
    "squeeze_excite": (_squeeze_excite,),
    "depthwise_conv": (_depthwise,),
    "bottleneck_conv": (_bottleneck_conv,),
    "self_attention": (partial(_attention, True), partial(_attention, False)),
    "bottleneck": tuple(partial(_paired, PHI[name]) for name in ("relu", "gelu", "silu")),
}


def is_built_in(form: Form, name: str) -> bool:
    """Whether a form is the one that a built-in blueprint of this name has."""
    return form.apply in _FORMS[name]


def register_blueprint(name: str, apply: Apply) -> None:
    """Says what a blueprint of your own computes in torch.

    Args:
      name: the blueprint's `name`.
      apply: `(parameters, u, mask, topology) -> r`: a dict of tensors `[n, ...]` of n adapters,
        their inputs `[n, ..., F]`, which features are real `[n, F]`, and the site's topology. It
        must compute, in `u`'s dtype, what the blueprint's `apply` does in JAX for each adapter, and
        is tried out against it when a model is grown.

    Raises:
      BridgeError: the name is taken by another function.
    """
    known = _FORMS.get(name)
    if known is not None and known != (apply,):
        raise BridgeError(f"blueprint {name!r} has a torch form already; choose another name")
    _FORMS[name] = (apply,)


@lru_cache(maxsize=256)
def form_of(blueprint: Blueprint, spec: AdapterSpec) -> Form:
    """The torch form of a blueprint, tried out on random parameters.

    Raises:
      BridgeError: there is none that computes the same.
    """
    if blueprint.activation in PHI:
        name = blueprint.activation
        candidates = [Form(partial(_dense, PHI[name]), name, name)]
    else:
        known = _FORMS.get(blueprint.name, ())
        candidates = [Form(apply, None, blueprint.activation) for apply in known]
    if not candidates:
        raise BridgeError(
            f"blueprint {blueprint.name!r} has no torch form; give it one with "
            f"torch_bridge.register_blueprint({blueprint.name!r}, apply)"
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda key: blueprint.init(key, spec, np.float32), key)
    if not isinstance(shapes, dict):
        raise BridgeError(
            f"blueprint {blueprint.name!r}: the bridge needs parameters in one flat dict, got "
            f"{type(shapes).__name__}"
        )
    source = np.random.default_rng(0)
    drawn = {
        name: source.standard_normal(leaf.shape).astype(np.float32) * 0.5
        for name, leaf in shapes.items()
    }
    inner = {"vector": (5,), "sequence": (2, 5), "image": (2, 4, 5)}[spec.topology]
    u = source.standard_normal((*inner, spec.inputs)).astype(np.float32)
    mask: Any = np.ones((spec.inputs,), bool)
    with (
        jax.default_device(cpu_device()),  # a GPU would round to tf32
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        expected = np.asarray(jax.jit(lambda p, u: blueprint.apply(p, u, spec, mask))(drawn, u))
    leaves = {name: torch.from_numpy(leaf)[None] for name, leaf in drawn.items()}
    inputs = (torch.from_numpy(u)[None], torch.from_numpy(mask)[None], spec.topology)
    for form in candidates:
        got = form.apply(leaves, *inputs)[0].numpy()
        if got.shape == expected.shape and np.allclose(got, expected, rtol=1e-3, atol=1e-3):
            return form
    raise BridgeError(
        f"blueprint {blueprint.name!r}: its torch form does not compute what its JAX form does "
        "(another option than the built-in one, perhaps); give your own a name of its own and "
        "torch_bridge.register_blueprint(name, apply)"
    )
