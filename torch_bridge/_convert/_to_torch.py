"""JAX functions as torch functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import torch

from torch_bridge._convert._leaves import check_kind, has_64_bits, jax_dtype, to_tensor
from torch_bridge._convert._program import Program, call
from torch_bridge._errors import BridgeError


class TorchFunction:
    """What `to_torch` returns: a JAX function that torch calls, differentiates and compiles."""

    def __init__(
        self,
        fn: Callable[..., Any],
        static_argnames: frozenset[str],
        device: jax.Device | None,
    ) -> None:
        self.__wrapped__ = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__doc__ = getattr(fn, "__doc__", None)
        self._static_argnames, self._device = static_argnames, device
        self._programs: dict[Any, tuple[Program, Any]] = {}

        def run(args: Any, kwargs: Any) -> Any:
            return self._run(args, kwargs)

        # torch's compiler does not look into `run`; it traces the operator that `run` calls.
        self._call = torch._dynamo.nonstrict_trace(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    def __repr__(self) -> str:
        return f"to_torch({self.__name__})"

    @property
    def num_traces(self) -> int:
        """How many signatures the function was traced for."""
        return len(self._programs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        static = {name: kwargs[name] for name in self._static_argnames & kwargs.keys()}
        rest = {name: value for name, value in kwargs.items() if name not in static}
        paths, treedef = jax.tree_util.tree_flatten_with_path((args, rest))
        tensors, avals = [], []
        for path, leaf in paths:
            tensor, aval = self._read(leaf, path)
            tensors.append(tensor)
            avals.append(aval)
        program, out_tree = self._program(treedef, tuple(avals), static)
        devices = [leaf.device for _, leaf in paths if isinstance(leaf, torch.Tensor)]
        outs = call(program, tensors, next(iter(devices), torch.device("cpu")))
        return jax.tree.unflatten(out_tree, outs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchFunction:
        return self  # a pure function: modules that hold it may be copied

    def _read(self, leaf: Any, path: Any) -> tuple[torch.Tensor, jax.ShapeDtypeStruct]:
        """Return a leaf as a tensor, and as what JAX traces."""
        if isinstance(leaf, torch.Tensor):
            check_kind(leaf, self._name(path))
            dtype = jax_dtype(leaf, self._name(path))
            return leaf, jax.ShapeDtypeStruct(tuple(int(size) for size in leaf.shape), dtype)
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            array = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
            tensor = to_tensor(array, None, None, self._name(path))
            return tensor, jax.ShapeDtypeStruct(leaf.shape, jax_dtype(tensor, self._name(path)))
        if isinstance(leaf, bool | int | float | complex | torch.SymInt | torch.SymFloat):
            # A plain number takes on the dtype of what it meets, in JAX as in torch.
            weak = np.asarray(jax.numpy.asarray(_plain(leaf)))
            aval = jax.ShapeDtypeStruct((), weak.dtype, weak_type=not isinstance(leaf, bool))
            return torch.tensor(_plain(leaf), dtype=to_tensor(weak, None, True, "").dtype), aval
        raise BridgeError(
            f"{self._name(path)} is a {type(leaf).__name__}; allowed: pytrees of tensors, arrays "
            "and numbers; pass it by keyword and name it in to_torch(..., static_argnames=...)"
        )

    def _program(
        self, treedef: Any, avals: tuple[jax.ShapeDtypeStruct, ...], static: dict[str, Any]
    ) -> tuple[Program, Any]:
        signature = tuple((aval.shape, aval.dtype, aval.weak_type) for aval in avals)
        key = (treedef, signature, _key(static, self.__name__), has_64_bits())
        if key not in self._programs:
            out_trees: list[Any] = []

            def flat(*arrays: Any) -> list[Any]:
                args, kwargs = jax.tree.unflatten(treedef, arrays)
                outs, out_tree = jax.tree.flatten(self.__wrapped__(*args, **kwargs, **static))
                out_trees.append(out_tree)
                return outs

            program = Program(flat, avals, self.__name__, self._device)
            self._programs[key] = program, out_trees[-1]
        return self._programs[key]

    def _name(self, path: Any) -> str:
        """Name an argument as the caller knows it."""
        which, rest = path[1], jax.tree_util.keystr(path[2:])
        if isinstance(which, jax.tree_util.SequenceKey):
            return f"argument {which.idx}{rest} of {self.__name__}"
        return f"argument {which.key!r}{rest} of {self.__name__}"


def to_torch(
    fn: Callable[..., Any],
    *,
    static_argnames: Iterable[str] = (),
    device: jax.Device | None = None,
) -> TorchFunction:
    """Make a JAX function callable, differentiable and compilable from torch.

    The result takes and returns pytrees of tensors where `fn` takes and returns pytrees of arrays:

    - *Derivatives*: `backward`, `torch.autograd.grad` and `torch.func.grad`, of any order. The
      first order keeps JAX's residuals and recomputes nothing; higher orders start again from the
      inputs. Integers and bools have none. Forward mode and `torch.vmap` are refused.
    - *`torch.compile(fullgraph=True)`* sees one operator. `fn` is traced once for each new
      combination of shapes, dtypes and static arguments, never for new values. torch puts results
      of dicts, lists and tuples together again, not of named tuples.
    - *Memory*: inputs and outputs cross by DLPack without a copy where the devices match (see
      `tree_to_jax` for what must be copied, and for 64-bit numbers). Outputs share no memory with
      anything, so they may be written into. JAX has finished when the call returns.
    - *Devices*: JAX computes on its CPU device, and takes no memory on torch's GPU; outputs come
      back to where the first tensor argument is.

    `fn` must be pure, as for `jax.jit`, which it needs not. A graph that torch exports
    or saves cannot hold it.

    Args:
      fn: a function of pytrees of arrays. Plain numbers stay weakly typed and are no new shape;
        arrays of JAX and numpy among the arguments are constants.
      static_argnames: arguments that are no arrays, passed by keyword and hashable.
      device: where JAX computes; its CPU device by default. On a CUDA device of JAX nothing is
        copied for tensors there.

    Returns:
      The function of tensors; `num_traces` counts the signatures it was traced for.

    Raises:
      BridgeError: when called with what cannot cross.

    Example:
      >>> import jax.numpy as jnp
      >>> sine = to_torch(jax.jit(jnp.sin))
      >>> x = torch.zeros(2, requires_grad=True)
      >>> sine(x).sum().backward()
      >>> x.grad
      tensor([1., 1.])
    """
    if isinstance(fn, torch.nn.Module) or not callable(fn):
        raise BridgeError(f"fn is a {type(fn).__name__}; it must be a function of JAX arrays")
    names = frozenset([static_argnames] if isinstance(static_argnames, str) else static_argnames)
    try:
        known = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        known = None
    if known is not None and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        unknown = sorted(names - known.keys())
        if unknown:
            raise BridgeError(
                f"static_argnames has {', '.join(unknown)}; allowed: {', '.join(known) or 'none'}"
            )
    return TorchFunction(fn, names, device)


def _key(static: dict[str, Any], name: str) -> Any:
    for argument, value in static.items():
        try:
            hash(value)
        except TypeError:
            raise BridgeError(
                f"the static argument {argument!r} of {name} is a {type(value).__name__}, which "
                "cannot be hashed; pass a tuple or a frozen dataclass"
            ) from None
    return tuple(sorted(static.items(), key=lambda item: item[0]))


def _plain(number: Any) -> Any:
    if isinstance(number, torch.SymInt):
        return int(number)
    return float(number) if isinstance(number, torch.SymFloat) else number
