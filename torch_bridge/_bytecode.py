"""Which parameters the bytecode of a function reads, and by which paths it comes to them."""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType
from typing import NamedTuple

LEAVES = ("weight", "bias")
LOOKUPS = frozenset(
    (
        "get_parameter",
        "get_submodule",
        "get_input_embeddings",
        "get_output_embeddings",
        "modules",
        "named_modules",
        "children",
        "named_children",
        "parameters",
        "named_parameters",
        "state_dict",
    )
)
"""Other ways by which code comes to a layer's weight."""
_HARMLESS = frozenset(
    ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_cuda", "requires_grad")
)
ANY_INDEX = "[]"
"""A subscript in a path, whatever its index."""


class Read(NamedTuple):
    """`root.path.name` in a function's code."""

    root: str | None
    """A variable's name; None where it is something else."""
    path: tuple[str, ...]
    name: str
    is_called: bool


@cache
def names_in(code: CodeType) -> frozenset[str]:
    """The names of globals and attributes in a function's code, and in the functions inside."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*map(names_in, inner))


@cache
def reads_in(code: CodeType) -> tuple[Read, ...]:
    """The parameters that a function's code reads, and the lookups it makes."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SKIPPED]
    reads = []
    for index, step in enumerate(steps):
        if step.opname in _ATTRIBUTES and step.argval in (*LEAVES, *LOOKUPS):
            start, root, path = _path_to(steps, index - 1)
            if not _is_harmless(steps, index) and not _is_type_test(steps, start):
                is_called = step.opname == "LOAD_METHOD" or "self" in step.argrepr
                reads.append(Read(root, path, step.argval, is_called))
        elif step.opname == "LOAD_CONST" and isinstance(step.argval, str):
            leaf = step.argval.rpartition(".")[2]
            if leaf in LEAVES and not _is_type_test(steps, _path_to(steps, index - 1)[0]):
                reads.append(Read(None, (), leaf, is_called=False))
        elif step.opname == "LOAD_CONST" and isinstance(step.argval, CodeType):
            reads += reads_in(step.argval)
    return tuple(reads)


_SKIPPED = frozenset(("CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "RESUME", "PUSH_NULL"))
_ATTRIBUTES = frozenset(("LOAD_ATTR", "LOAD_METHOD"))
_CALLS = frozenset(("CALL", "GET_ITER", "PRECALL", "CALL_FUNCTION", "CALL_METHOD"))


def _is_harmless(steps: list[dis.Instruction], index: int) -> bool:
    """Whether only a dtype or shape is read: `weight.dtype`, `next(x.parameters()).device`."""
    is_lookup = steps[index].argval in LOOKUPS
    following = index + 1
    while is_lookup and following < len(steps) and steps[following].opname in _CALLS:
        following += 1
    return (
        following < len(steps)
        and steps[following].opname in _ATTRIBUTES
        and steps[following].argval in _HARMLESS
    )


def _is_type_test(steps: list[dis.Instruction], start: int) -> bool:
    """Whether only its type is tested: `isinstance(layer.weight, Tensor)`."""
    before = steps[start - 1] if start > 0 else None
    return (
        before is not None
        and before.opname == "LOAD_GLOBAL"
        and before.argval in {"hasattr", "isinstance"}
    )


def _path_to(steps: list[dis.Instruction], end: int) -> tuple[int, str | None, tuple[str, ...]]:
    """Where the value begins that lies on the stack after instruction `end`; variable and path."""
    path: list[str] = []
    while end >= 0:
        step = steps[end]
        if step.opname in _ATTRIBUTES:
            path.append(step.argval)
            end -= 1
        elif step.opname == "BINARY_SUBSCR" or (
            step.opname == "BINARY_OP" and step.argrepr == "[]"
        ):
            path.append(ANY_INDEX)
            index = steps[end - 1]
            if isinstance(index.argval, tuple) and index.opname.startswith("LOAD_FAST"):
                return end - 1, index.argval[0], tuple(reversed(path))
            if not index.opname.startswith("LOAD_") or index.opname in _ATTRIBUTES:
                break
            end -= 2
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "STORE_FAST_LOAD")):
            name = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            return end, name, tuple(reversed(path))
        else:
            break
    return -1, None, ()
