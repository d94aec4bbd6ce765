"""How often `torch.compile` analyses the kernels of `graft`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

_NAMES = ("identify_accessed_tensors", "identify_mutated_tensors")
"""What looks for the tensors that a kernel writes, in torch 2.13 and in torch 2.11."""
_KERNELS = frozenset(("forward_kernel", "statistics_kernel", "backward_kernel", "reduce_kernel"))


@contextmanager
def analyse_kernels_once() -> Iterator[None]:
    """While it lasts, `torch.compile` analyses each kernel of `graft` once.

    By itself torch translates a kernel to see what it writes, some 0.1 s, and about nine times for
    each launch in a program: minutes for a model with a hundred sites. It has no setting for that,
    so this replaces two of its private functions until the block ends. Compile inside of it: the
    first training step, usually. What is compiled is the same.

    >>> with analyse_kernels_once():
    ...     pass  # loss = compiled_model(batch); loss.backward()
    """
    import torch._higher_order_ops.triton_kernel_wrap as kernel_wrap

    look_ups = {name: getattr(kernel_wrap, name) for name in _NAMES if hasattr(kernel_wrap, name)}
    for name, look_up in look_ups.items():
        setattr(kernel_wrap, name, _once(look_up))
    try:
        yield
    finally:
        for name, look_up in look_ups.items():
            setattr(kernel_wrap, name, look_up)


def _once(look_up: Callable[..., Any]) -> Callable[..., Any]:
    """`look_up(kernel, kwargs, descriptors)`, remembered for kernels of `graft`."""
    known: dict[Any, Any] = {}

    @wraps(look_up)
    def remembered(kernel: Any, kwargs: Mapping[str, Any], *rest: Any) -> Any:
        function = getattr(kernel, "fn", kernel)
        name = getattr(function, "__name__", "")
        if name not in _KERNELS or not function.__module__.startswith("esper_kernels."):
            return look_up(kernel, kwargs, *rest)
        kinds = ((key, str(getattr(value, "dtype", value))) for key, value in kwargs.items())
        call = name, frozenset(kinds)
        if call not in known:
            known[call] = look_up(kernel, kwargs, *rest)
        return copy.copy(known[call])

    return remembered
