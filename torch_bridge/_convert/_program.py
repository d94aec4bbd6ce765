"""JAX functions of flat lists of arrays, as torch sees them: one operator, one derivative rule.

A `Program` is a JAX function traced for one signature. It runs inside the operator
`torch_bridge::jax_program`, which torch's compiler calls without looking inside, and it makes
the programs of its derivatives when they are first asked for:

- `with_residuals`: its outputs, and what a derivative needs of the way to them;
- `pullback`: from inputs, residuals and cotangents to the inputs' cotangents;
- the pullback's own derivative goes through `vjp` of `vjp`, computed anew from the inputs, so
  any order works and only orders above the first pay for it.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.core import jaxpr_as_fun

from torch_bridge._convert._devices import cpu_device
from torch_bridge._convert._leaves import to_array, to_tensor, torch_dtype
from torch_bridge._errors import BridgeError

Avals = tuple[jax.ShapeDtypeStruct, ...]

_PROGRAMS: weakref.WeakValueDictionary[str, Program] = weakref.WeakValueDictionary()


class Program:
    """A JAX function `flat(*arrays) -> list of arrays`, traced for one signature.

    Args:
      flat: the function.
      avals: shape and dtype of each input.
      name: for messages, and the first part of the handle.
      device: where JAX computes; None is JAX's CPU device.

    Attributes:
      handle: how torch's graphs name the program: unlike in any other process, so that no graph
        from a cache on disk finds the wrong one.
      outs: shape and dtype of each output.
    """

    def __init__(
        self,
        flat: Callable[..., Sequence[Any]],
        avals: Avals,
        name: str,
        device: jax.Device | None,
    ) -> None:
        self.flat, self.avals, self.name = flat, avals, name
        self.device = cpu_device() if device is None else device
        with jax.default_device(self.device):
            self.closed = jax.make_jaxpr(flat)(*avals)
        self.outs: Avals = tuple(
            jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.closed.out_avals
        )
        self.dtypes = [torch_dtype(out.dtype, f"a result of {name}") for out in self.outs]
        self.handle = f"{name}:{uuid.uuid4().hex}"
        self._run = jax.jit(jaxpr_as_fun(self.closed))
        self._derived: dict[Any, Any] = {}
        _PROGRAMS[self.handle] = self

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the outputs as tensors that share memory with nothing else."""
        arrays = [
            to_array(tensor, self.device, None, f"input {number} of {self.name}")
            for number, tensor in enumerate(inputs)
        ]
        with jax.default_device(self.device):
            # Ready before torch goes on: torch may write into what the inputs share with it.
            outs = jax.block_until_ready(self._run(*arrays))
        taken = {tensor.data_ptr() for tensor in inputs}
        taken |= {_address(array) for array in (*arrays, *self.closed.consts)}
        tensors = []
        for out in outs:
            tensor = to_tensor(out, None, None, f"a result of {self.name}")
            # XLA hands an input, a constant or one output twice through where it can.
            if tensor.data_ptr() in taken:
                tensor = tensor.clone()
            taken.add(tensor.data_ptr())
            tensors.append(tensor)
        return tensors

    def fake(self, device: torch.device) -> list[torch.Tensor]:
        """Return tensors of the outputs' shapes and dtypes."""
        return [
            torch.empty(out.shape, dtype=dtype, device=device)
            for out, dtype in zip(self.outs, self.dtypes, strict=True)
        ]

    def with_residuals(self, needs: tuple[bool, ...]) -> tuple[Program, list[int], Program]:
        """Return the program with residuals, where they are, and the program of the pullback.

        Args:
          needs: which inputs need a cotangent.

        Returns:
          The program whose outputs are this one's and residuals that are nowhere else; for each
          residual of the pullback its number among inputs and these outputs; the pullback.
        """
        if ("first", needs) not in self._derived:
            self._derived["first", needs] = self._differentiate(needs)
        return self._derived["first", needs]

    def _differentiate(self, needs: tuple[bool, ...]) -> tuple[Program, list[int], Program]:
        function = jaxpr_as_fun(self.closed)
        structure: list[Any] = []

        def forward(*arrays: Any) -> list[Any]:
            outs, pullback = _vjp(function, needs, arrays)
            residuals, treedef = jax.tree.flatten(pullback)
            structure[:] = treedef, [jax.typeof(value) for value in residuals]
            return [*outs, *residuals]

        name = f"{self.name} (with residuals)"
        both = Program(forward, self.avals, name, self.device)
        treedef, residual_avals = structure
        located, returned = _locate(both, len(self.outs))
        if len(returned) < len(both.outs):
            every = jaxpr_as_fun(both.closed)

            def slim(*arrays: Any) -> list[Any]:
                outs = every(*arrays)
                return [outs[number] for number in returned]

            both = Program(slim, self.avals, name, self.device)

        def backward(*arrays: Any) -> list[Any]:
            residuals, cotangents = arrays[: len(located)], arrays[len(located) :]
            return _pull(jax.tree.unflatten(treedef, residuals), self.outs, cotangents)

        avals = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in residual_avals
        ]
        pullback = Program(
            backward, (*avals, *self.cotangents), f"{self.name} (pullback)", self.device
        )
        return both, located, pullback

    @property
    def cotangents(self) -> Avals:
        """Shape and dtype of the cotangents: those of the outputs that have any."""
        return tuple(out for out in self.outs if _is_inexact(out.dtype))

    def pullback(self, needs: tuple[bool, ...]) -> Program:
        """Return `(*inputs, *cotangents) -> inputs' cotangents` as a program of its own."""
        if ("whole", needs) not in self._derived:
            function = jaxpr_as_fun(self.closed)
            num_inputs = len(self.avals)

            def whole(*arrays: Any) -> list[Any]:
                _, pullback = _vjp(function, needs, arrays[:num_inputs])
                return _pull(pullback, self.outs, arrays[num_inputs:])

            self._derived["whole", needs] = Program(
                whole, (*self.avals, *self.cotangents), f"{self.name} (derivative)", self.device
            )
        return self._derived["whole", needs]


def _is_inexact(dtype: Any) -> bool:
    """Tell whether numbers of this dtype have derivatives."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def lookup(handle: str) -> Program:
    """Return the program that a graph of torch names.

    Raises:
      BridgeError: if it is gone or of another process.
    """
    program = _PROGRAMS.get(handle)
    if program is None:
        raise BridgeError(
            f"the JAX function {handle.split(':', maxsplit=1)[0]!r} of this graph is gone: keep "
            "the result of torch_bridge.to_torch as long as what was compiled with it; a saved or "
            "exported graph cannot hold a JAX function"
        )
    return program


def call(program: Program, inputs: Sequence[torch.Tensor], device: torch.device) -> Any:
    """Run a program on tensors, differentiably; return a tuple of tensors."""
    needs = tuple(
        tensor.requires_grad and _is_inexact(aval.dtype)
        for tensor, aval in zip(inputs, program.avals, strict=True)
    )
    if torch.is_grad_enabled() and any(needs) and program.cotangents:
        outs = _Differentiable.apply(program, needs, device, *inputs)
        return outs[: len(program.outs)]
    return tuple(_run(program.handle, list(inputs), device))


@torch.library.custom_op("torch_bridge::jax_program", mutates_args=())  # type: ignore[untyped-decorator]
def _run(handle: str, inputs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [out.to(device) for out in lookup(handle).run(inputs)]


@_run.register_fake  # type: ignore[untyped-decorator]
def _(handle: str, inputs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return lookup(handle).fake(device)


@_run.register_vmap  # type: ignore[untyped-decorator]
def _(info: Any, in_dims: Any, handle: str, inputs: Any, device: torch.device) -> Any:
    raise BridgeError(_NO_VMAP.format(name=handle.split(":", maxsplit=1)[0]))


_NO_VMAP = (
    "torch.vmap over the JAX function {name!r} is not supported; put jax.vmap into the function: "
    "torch_bridge.to_torch(jax.vmap(fn, in_axes=...))"
)
_NO_JVP = (
    "forward-mode derivatives of the JAX function {name!r} are not supported in torch; use "
    "backward() or torch.func.grad, or take jax.jvp inside the function"
)


class _ReverseOnly(torch.autograd.Function):  # type: ignore[misc]
    """A function of a program, the first argument, that refuses all but backward passes."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, program: Program, *args: Any) -> Any:
        raise BridgeError(_NO_VMAP.format(name=program.name))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise BridgeError(_NO_JVP.format(name=ctx.program.name))


class _Differentiable(_ReverseOnly):
    """The outputs of a program, then its residuals."""

    @staticmethod
    def forward(program: Program, needs: Any, device: torch.device, *inputs: torch.Tensor) -> Any:
        both, _, _ = program.with_residuals(needs)
        return tuple(_run(both.handle, list(inputs), device))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.program, ctx.needs, ctx.device = inputs[:3]
        num_outs = len(ctx.program.outs)
        fixed = [
            out for out in output[:num_outs] if not (out.is_floating_point() or out.is_complex())
        ]
        ctx.mark_non_differentiable(*fixed, *output[num_outs:])
        ctx.set_materialize_grads(False)
        # The inputs are saved (higher derivatives start from them) and what is not among them.
        _, located, _ = ctx.program.with_residuals(ctx.needs)
        num_inputs = len(ctx.program.avals)
        ctx.outputs = sorted({number for number in located if number >= num_inputs})
        saved = [output[number - num_inputs] for number in ctx.outputs]
        ctx.save_for_backward(*inputs[3:], *saved)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        program, needs = ctx.program, ctx.needs
        num_inputs = len(program.avals)
        saved = ctx.saved_tensors
        inputs = saved[:num_inputs]
        values = dict(zip((*range(num_inputs), *ctx.outputs), saved, strict=True))
        _, located, _ = program.with_residuals(needs)
        residuals = [values[number] for number in located]
        cotangents = [
            torch.zeros(out.shape, dtype=dtype, device=ctx.device) if grad is None else grad
            for grad, out, dtype in zip(grads, program.outs, program.dtypes, strict=False)
            if _is_inexact(out.dtype)
        ]
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*inputs, *cotangents)
        ):
            pulled = _Pullback.apply(
                program, needs, ctx.device, len(residuals), *inputs, *residuals, *cotangents
            )
        else:
            pulled = _pull_now(program, needs, ctx.device, residuals, cotangents)
        it = iter(pulled)
        grads_in = (
            next(it).to(tensor.device) if need else None
            for need, tensor in zip(needs, inputs, strict=True)
        )
        return None, None, None, *grads_in


class _Pullback(_ReverseOnly):
    """A pullback from residuals, whose own derivative starts again from the inputs."""

    @staticmethod
    def forward(
        program: Program, needs: Any, device: torch.device, num_residuals: int, *tensors: Any
    ) -> Any:
        rest = tensors[len(program.avals) :]
        return tuple(_pull_now(program, needs, device, rest[:num_residuals], rest[num_residuals:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.program, ctx.needs, ctx.device, ctx.num_residuals = inputs[:4]
        tensors = inputs[4:]
        num_inputs = len(ctx.program.avals)
        ctx.save_for_backward(*tensors[:num_inputs], *tensors[num_inputs + ctx.num_residuals :])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        program, needs = ctx.program, ctx.needs
        derivative = program.pullback(needs)
        second = derivative.pullback(tuple(_is_inexact(aval.dtype) for aval in derivative.avals))
        pulled = iter(call(second, [*ctx.saved_tensors, *grads], ctx.device))
        pulled_all = [
            next(pulled) if _is_inexact(aval.dtype) else None for aval in derivative.avals
        ]
        num_inputs = len(program.avals)
        return (
            *(None,) * 4,
            *pulled_all[:num_inputs],
            *(None,) * ctx.num_residuals,
            *pulled_all[num_inputs:],
        )


def _pull_now(
    program: Program, needs: Any, device: torch.device, residuals: Any, cotangents: Any
) -> list[torch.Tensor]:
    _, _, pullback = program.with_residuals(needs)
    return _run(pullback.handle, [*residuals, *cotangents], device)


def _vjp(function: Any, needs: tuple[bool, ...], arrays: Sequence[Any]) -> Any:
    """`jax.vjp` with respect to the inputs that need it."""

    def restricted(*needed: Any) -> Any:
        it = iter(needed)
        return function(
            *(next(it) if need else array for need, array in zip(needs, arrays, strict=True))
        )

    return jax.vjp(restricted, *(a for need, a in zip(needs, arrays, strict=True) if need))


def _pull(pullback: Any, outs: Avals, cotangents: Sequence[Any]) -> list[Any]:
    """Call a pullback with the cotangents of the outputs that have any."""
    it = iter(cotangents)
    every = [
        next(it) if _is_inexact(out.dtype) else np.zeros(out.shape, jax.dtypes.float0)
        for out in outs
    ]
    return list(pullback(every))


def _locate(both: Program, num_outs: int) -> tuple[list[int], list[int]]:
    """Find each residual among inputs, outputs and the residuals before it.

    Returns:
      The number of each residual among inputs and returned outputs, and which outputs those are.
    """
    inputs, outs = both.closed.jaxpr.invars, both.closed.jaxpr.outvars
    known = {id(variable): number for number, variable in enumerate(inputs)}
    returned = list(range(num_outs))
    for position, variable in enumerate(outs[:num_outs]):
        known.setdefault(id(variable), len(inputs) + position)
    for position, variable in enumerate(outs[num_outs:], num_outs):
        if id(variable) not in known:
            known[id(variable)] = len(inputs) + len(returned)
            returned.append(position)
    return [known[id(variable)] for variable in outs[num_outs:]], returned


def _address(value: Any) -> int:
    return value.unsafe_buffer_pointer() if isinstance(value, jax.Array) else 0
