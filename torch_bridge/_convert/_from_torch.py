"""Torch modules and functions as JAX functions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from torch_bridge._convert._leaves import is_numpy_own, jax_dtype, to_tensor, torch_dtype
from torch_bridge._convert._program import is_inexact
from torch_bridge._convert._trees import tree_to_jax
from torch_bridge._errors import BridgeError


class JaxModule(NamedTuple):
    """A torch module as JAX sees it.

    Attributes:
      apply: `(params, *args, **kwargs) -> outputs`, pytrees of arrays.
      params: the parameters as arrays, by their dotted names; a copy.
    """

    apply: Callable[..., Any]
    params: dict[str, jax.Array]


def from_torch(module_or_fn: Any) -> Any:
    """Make a torch module or function without side effects a function of JAX arrays.

    Torch runs in a callback from JAX's compiled program, on the device where the module's
    parameters are (for a function, on the CPU):

    - *`jit`*: results' shapes come from a run on fake tensors while JAX traces.
    - *`grad`*, of any order, in reverse mode: a backward pass runs torch's forward again under
      autograd, since torch's graph cannot stay in a JAX program.
    - *`vmap`* calls torch once for each element, one after the other.

    What this is for: a loss, a metric, a teacher or an encoder that exists in torch only. Each call
    leaves XLA and copies its arguments and results.

    A module's parameters come as a dict by dotted name, tied ones once. Its buffers are constants,
    copied now; so is whether it is in training mode. Arguments: arrays and Python scalars become
    tensors when JAX traces them; outside of `jit`, numbers, strings and None go to torch as they
    are.

    Args:
      module_or_fn: an `nn.Module`, or a function of tensors. It must be pure: it may not draw
        random numbers (dropout in training mode), write into buffers (batch normalisation in
        training mode), parameters or arguments, or let values decide shapes. These are noticed
        where they happen in torch. What Python code does beside (a counter, a cache) is not: keep
        it out.

    Returns:
      `JaxModule(apply, params)` for a module, a function of arrays for a function.

    Raises:
      BridgeError: when called, for what is not pure; for arguments that cannot cross.

    Example:
      >>> apply, params = from_torch(torch.nn.Linear(3, 2))
      >>> sorted(params)
      ['bias', 'weight']
      >>> grads = jax.grad(lambda params: apply(params, jnp.ones((4, 3))).sum())(params)
      >>> grads["bias"].tolist()
      [4.0, 4.0]
    """
    if isinstance(module_or_fn, torch.nn.Module):
        return _from_module(module_or_fn)
    if not callable(module_or_fn):
        raise BridgeError(
            f"module_or_fn is a {type(module_or_fn).__name__}; it must be an nn.Module or a "
            "function of tensors"
        )
    name = getattr(module_or_fn, "__name__", type(module_or_fn).__name__)

    def apply(*args: Any, **kwargs: Any) -> Any:
        return _bind(module_or_fn, name, torch.device("cpu"), (args, kwargs))

    apply.__name__ = name
    apply.__doc__ = module_or_fn.__doc__
    return apply


def _from_module(module: torch.nn.Module) -> JaxModule:
    name = type(module).__name__
    parameters = dict(module.named_parameters())
    devices = {tensor.device for tensor in (*parameters.values(), *module.buffers())}
    if len(devices) > 1:
        raise BridgeError(
            f"{name} is spread over {', '.join(sorted(map(str, devices)))}; move it to one device"
        )
    device = next(iter(devices), torch.device("cpu"))
    buffers = {key: buffer.detach().clone() for key, buffer in module.named_buffers()}
    training = {key: part.training for key, part in module.named_modules()}

    def run(params: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
        now = {key: part.training for key, part in module.named_modules()}
        if now != training:
            changed = next(key for key in now if now[key] != training.get(key))
            raise BridgeError(
                f"{name} was {'in training mode' if training.get(changed) else 'in eval mode'} "
                f"{f'at {changed} ' if changed else ''}when it was converted and no longer is; "
                "convert it again"
            )
        # Fresh copies in a real run are not needed: the run on fake tensors has shown that nothing
        # writes into them.
        return torch.func.functional_call(module, (params, buffers), args, kwargs)

    def apply(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if set(params) != set(parameters):
            missing = sorted(set(parameters) - set(params))
            unknown = sorted(set(params) - set(parameters))
            raise BridgeError(
                f"params of {name} "
                + (f"lack {', '.join(missing)}" if missing else f"have {', '.join(unknown)}")
                + f"; allowed: exactly {', '.join(sorted(parameters)) or 'none'}"
            )
        return _bind(run, name, device, ((params, args, kwargs), {}))

    return JaxModule(apply=apply, params=tree_to_jax(parameters, copy=True))


def _bind(function: Callable[..., Any], name: str, device: torch.device, call: Any) -> Any:
    """Call a torch function from JAX with `call = (args, kwargs)`."""
    leaves, treedef = jax.tree.flatten(call)
    is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
    for leaf, known in zip(leaves, is_array, strict=True):
        if isinstance(leaf, torch.Tensor):
            raise BridgeError(
                f"an argument of {name} is a torch tensor; it is a JAX function now: convert the "
                "argument with torch_bridge.tree_to_jax"
            )
        if known:
            torch_dtype(leaf.dtype, f"an argument of {name}")
    arrays = [jnp.asarray(leaf) for leaf, known in zip(leaves, is_array, strict=True) if known]

    def flat(*tensors: torch.Tensor) -> Any:
        it = iter(tensors)
        args, kwargs = jax.tree.unflatten(
            treedef,
            [next(it) if known else leaf for leaf, known in zip(leaves, is_array, strict=True)],
        )
        return function(*args, **kwargs)

    outs, out_tree = _trace(flat, [jax.typeof(array) for array in arrays], name, device)

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return jax.tree.leaves(flat(*tensors))

    return jax.tree.unflatten(out_tree, _differentiable(run, outs, name, device)(*arrays))


def _differentiable(
    run: Callable[..., list[torch.Tensor]],
    outs: list[jax.ShapeDtypeStruct],
    name: str,
    device: torch.device,
) -> Callable[..., list[jax.Array]]:
    """Return a JAX function of arrays that calls `run`; its derivative is one such again."""

    @jax.custom_vjp
    def apply(*arrays: Any) -> list[Any]:
        return _call_back(run, outs, name, device, arrays)

    def forward(*arrays: Any) -> Any:
        return apply(*arrays), arrays

    def backward(arrays: Any, cotangents: Any) -> Any:
        wanted = [is_inexact(array.dtype) for array in arrays]
        given = [is_inexact(out.dtype) for out in outs]
        flows = [ct for ct, has in zip(cotangents, given, strict=True) if has]

        def pull(*tensors: torch.Tensor) -> list[torch.Tensor]:
            return _pull(run, wanted, given, tensors)

        grads = iter(
            _differentiable(
                pull,
                [
                    jax.ShapeDtypeStruct(array.shape, array.dtype)
                    for array, want in zip(arrays, wanted, strict=True)
                    if want
                ],
                f"the derivative of {name}",
                device,
            )(*arrays, *flows)
        )
        return tuple(
            next(grads) if want else np.zeros(array.shape, jax.dtypes.float0)
            for array, want in zip(arrays, wanted, strict=True)
        )

    apply.defvjp(forward, backward)
    return apply


def _pull(
    run: Callable[..., list[torch.Tensor]],
    wanted: list[bool],
    given: list[bool],
    tensors: tuple[torch.Tensor, ...],
) -> list[torch.Tensor]:
    """Return the cotangents of the inexact inputs, by torch's autograd."""
    inputs, cotangents = tensors[: len(wanted)], list(tensors[len(wanted) :])
    needs_graph = any(tensor.requires_grad for tensor in tensors)
    with torch.enable_grad():
        # A fresh node for each input, so that one tensor given twice has two derivatives.
        held = [
            (tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_())
            if want
            else tensor
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        outs = run(*held)
    pairs = [
        (out, cotangent)
        for out, cotangent in zip(
            (out for out, has in zip(outs, given, strict=True) if has), cotangents, strict=True
        )
        if out.requires_grad
    ]
    sources = [tensor for tensor, want in zip(held, wanted, strict=True) if want]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in sources]
    grads = torch.autograd.grad(
        [out for out, _ in pairs],
        sources,
        [cotangent for _, cotangent in pairs],
        create_graph=needs_graph,
        allow_unused=True,
    )
    return [
        torch.zeros_like(tensor) if grad is None else grad
        for grad, tensor in zip(grads, sources, strict=True)
    ]


def _call_back(
    run: Callable[..., list[torch.Tensor]],
    outs: list[jax.ShapeDtypeStruct],
    name: str,
    device: torch.device,
    arrays: tuple[Any, ...],
) -> list[Any]:
    def on_host(*values: Any) -> list[np.ndarray[Any, Any]]:
        tensors = [
            # A copy: JAX's arrays may not change, and torch code may.
            to_tensor(np.asarray(value), device, True, f"an argument of {name}")
            for value in values
        ]
        results = _outside_autograd(lambda: run(*tensors))
        return [_to_numpy(result, out, name) for result, out in zip(results, outs, strict=True)]

    return list(jax.pure_callback(on_host, outs, *arrays, vmap_method="sequential"))


def _outside_autograd(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Run torch code as from the top, wherever the callback happens to run.

    XLA may call back in the thread that is just inside a torch operator (`to_torch` around
    `from_torch`). Autograd is switched off there, and `enable_grad` does not bring it back, so
    derivatives would come out as zero; another thread starts afresh.
    """
    with torch.enable_grad():
        is_recording = (torch.empty(0, requires_grad=True) * 1).requires_grad
    if is_recording:
        with torch.no_grad():
            return run()
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(torch.no_grad()(run)).result()


def _to_numpy(tensor: torch.Tensor, out: jax.ShapeDtypeStruct, name: str) -> np.ndarray[Any, Any]:
    """Return a result for JAX, without calling JAX: inside a callback that may not return."""
    if tuple(tensor.shape) != out.shape:
        raise BridgeError(
            f"a result of {name} has the shape {tuple(tensor.shape)}, and {out.shape} when it was "
            "traced: its shape may not depend on values"
        )
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not is_numpy_own(out.dtype):
        bits = tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.uint16)
        return bits.numpy().view(out.dtype)
    wide = tensor.numpy()
    if wide.dtype != out.dtype and wide.size:
        limits = np.iinfo(out.dtype)
        if wide.min() < limits.min or wide.max() > limits.max:
            raise BridgeError(
                f"a result of {name} is {wide.dtype} with values from {wide.min()} to "
                f"{wide.max()}; without jax_enable_x64 JAX holds {limits.min} to {limits.max}"
            )
    return wide.astype(out.dtype, copy=False)


def _trace(
    flat: Callable[..., Any], avals: list[Any], name: str, device: torch.device
) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """Run on fake tensors: find the results' shapes, refuse what is not pure."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes:
        tensors = [
            torch.empty(aval.shape, dtype=torch_dtype(aval.dtype, name), device=device)
            for aval in avals
        ]
    versions = [tensor._version for tensor in tensors]
    try:
        with torch.no_grad(), fakes, _Purity(name):
            results = flat(*tensors)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise BridgeError(
            f"{name} reads values in Python ({error.func}: an `if`, an .item() or a mask that "
            "decides a shape); JAX traces without values: rewrite it with torch.where"
        ) from error
    for number, (tensor, version) in enumerate(zip(tensors, versions, strict=True)):
        if tensor._version != version:
            raise BridgeError(
                f"{name} writes into its argument {number} in place; make it return the new value"
            )
    leaves, out_tree = jax.tree.flatten(results)
    outs = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise BridgeError(
                f"{name} returns a {type(leaf).__name__}; allowed: pytrees of tensors (a class of "
                "its own must be registered with jax.tree_util)"
            )
        dtype = jax_dtype(leaf, f"a result of {name}")
        outs.append(jax.ShapeDtypeStruct(tuple(int(size) for size in leaf.shape), dtype))
    return outs, out_tree


class _Purity(TorchDispatchMode):  # type: ignore[misc]
    """Refuses random numbers, and writing into what existed before."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise BridgeError(
                f"{self.name} draws random numbers ({func}), as dropout does in training mode; "
                "call .eval() first, or draw in JAX and pass the numbers in"
            )
        if func._schema.is_mutable:
            for number, argument in enumerate(func._schema.arguments):
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if is_written and not isinstance(value, FakeTensor):
                    raise BridgeError(
                        f"{self.name} writes into a buffer or an outer tensor ({func}), as batch "
                        "normalisation does in training mode; call .eval() first, or return the "
                        "new value"
                    )
        return func(*args, **kwargs)
