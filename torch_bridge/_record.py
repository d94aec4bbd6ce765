"""The lifecycle as a buffer of the model, so that it goes wherever the model's numbers go.

A copy of a model (an average of its weights, the best one so far) has a lifecycle of its own, and
what torch's tools do to a copy they do to its parameters and buffers: `AveragedModel` copies or
averages them, Lightning swaps two models' in place. So one buffer of the first site holds the
packed lifecycle. Whoever writes into it moves that model to another point of its life.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_bridge._errors import BridgeError

_MARK = b"life"
_SIZE = 16
"""Bytes after the packed lifecycle: the mark, its age, a checksum."""
_ARITHMETIC = {
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul"),
    *("div", "truediv", "true_divide", "rtruediv", "itruediv", "divide", "multiply", "subtract"),
    *("lerp", "addcmul", "addcdiv"),
}
_OWNERS: weakref.WeakSet[Any] = weakref.WeakSet()
"""Sites with a record."""


class Record(Tensor):  # type: ignore[misc] # torch is untyped here
    """The bytes of a lifecycle, which are copied like any others but never averaged.

    A sum or product is the newest record among its terms: where parameters are averaged, the
    average lives as the model does. In files it is a plain tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch calls in place of a function of records."""
        name = func.__name__.strip("_").removeprefix("foreach_")
        is_in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        is_in_place = is_in_place or name in ("iadd", "isub", "imul", "itruediv")
        is_list = bool(args) and isinstance(args[0], (list, tuple))
        targets = list(args[0]) if is_list else list(args[:1])
        if name in _ARITHMETIC:
            terms = _by_entry(args) if is_list else [(*args, *(kwargs or {}).values())]
            newest = [_newest(each) for each in terms]
            if not is_in_place:
                return newest if is_list else newest[0]
            for target, value in zip(targets, newest, strict=True):
                target.copy_(value)
            return None if is_list else args[0]
        if func.__name__ == "copy_" and args[0].shape != args[1].shape:
            raise BridgeError(
                "the lifecycle of a grown model was copied into one that is not grown alike: its "
                "targets, chunks, blueprints or capacity differ; copy the model (copy.deepcopy, "
                "AveragedModel) after it has loaded what it starts from"
            )
        result = super().__torch_function__(func, types, args, kwargs or {})
        if is_in_place or func.__name__ == "__set__":
            for target in targets:
                if isinstance(target, Record):
                    _notify_owner(target)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        twin: Record = self.detach().clone()
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)


def _by_entry(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The terms for each entry of a `_foreach_` function."""
    for k in range(len(args[0])):
        yield tuple(term[k] if isinstance(term, (list, tuple)) else term for term in args)


def _newest(terms: tuple[Any, ...]) -> Record:
    records = [record for record in terms if isinstance(record, Record)]
    return max(reversed(records), key=age_of)  # the last of several that are equally old


def _plain(record: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        plain: Tensor = record.detach().as_subclass(Tensor)
        return plain


def _bytes(record: Tensor, first: int = 0) -> bytes:
    part = _plain(record)[first:]
    data: bytes = part.to(device="cpu", dtype=torch.uint8).numpy().tobytes()
    return data


def age_of(record: Tensor) -> int:
    """How often its lifecycle had changed."""
    tail = _bytes(record, -_SIZE)
    return int.from_bytes(tail[4:12], "little") if tail[:4] == _MARK else -1


def seal(packed: bytes, age: int) -> Record:
    """The record of a packed lifecycle."""
    data = packed + _MARK + age.to_bytes(8, "little")
    data += zlib.crc32(data).to_bytes(4, "little")
    record: Record = torch.frombuffer(bytearray(data), dtype=torch.uint8).as_subclass(Record)
    return record


def unseal(record: Any) -> tuple[bytes, int]:
    """A packed lifecycle and its age.

    Raises:
      BridgeError: it is none, or its bytes are no longer those of one lifecycle.
    """
    if not (isinstance(record, Tensor) and record.dtype == torch.uint8 and record.ndim == 1):
        raise BridgeError(
            "the state dict's lifecycle cannot be read: it is not a tensor of bytes; nothing was "
            "loaded"
        )
    data = _bytes(record)
    tail = data[-_SIZE:]
    if tail[:4] != _MARK or zlib.crc32(data[:-4]) != int.from_bytes(tail[12:], "little"):
        raise BridgeError(
            "the buffer `lifecycle` of a grown model was changed by something other than a copy: "
            "it holds bytes, of which there is no mean; average parameters, and copy buffers from "
            "the model (AveragedModel(model, use_buffers=False) does). If it is from a file, that "
            "is damaged. Nothing was loaded"
        )
    return data[:-_SIZE], int.from_bytes(tail[4:12], "little")


def own(site: Any) -> None:
    """Calls `site.receive()` from now on whenever the site's record is written."""
    _OWNERS.add(site)


def write_(record: Tensor, value: Record) -> None:
    """Puts a value into a record without telling its owner."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        record.copy_(value)


def _notify_owner(written: Record) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        memory = written.untyped_storage().data_ptr()
        owners = [owner for owner in _OWNERS if owner.record.untyped_storage().data_ptr() == memory]
    for site in owners:
        site.receive()
