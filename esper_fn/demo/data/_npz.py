"""Reads named arrays from a zip file without ever unpickling."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """The requirements on an array of an npz file: at most `max_examples` of `example_shape`."""

    dtype: str
    max_examples: int
    example_shape: tuple[int, ...] = ()


def parse_npz(content: bytes, members: Mapping[str, Member]) -> dict[str, np.ndarray]:
    """Returns the arrays of an npz file that holds exactly `members`.

    Each header is checked against its bounds before the array is allocated.

    Args:
      content: the file.
      members: what is expected under each key.

    Raises:
      ValueError: the content is anything else; the message says what it is.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            present = sorted(archive.namelist())
            expected = sorted(f"{key}.npy" for key in members)
            if present != expected:
                raise ValueError(f"npz holds {present}, not {expected}")
            return {key: _read_member(archive, key, member) for key, member in members.items()}
    except ValueError:
        raise
    except Exception as error:  # damaged bytes make zipfile and numpy raise of every kind
        raise ValueError(f"it is not a sound npz file ({error})") from error


def _read_member(archive: zipfile.ZipFile, key: str, member: Member) -> np.ndarray:
    with archive.open(f"{key}.npy") as stream:
        _check_header(stream, key, member)
    with archive.open(f"{key}.npy") as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):  # reading to the end also checks zip's own checksum
            raise ValueError(f"array {key!r} goes on after its {array.nbytes} bytes")
    return array


def _check_header(stream: IO[bytes], key: str, member: Member) -> None:
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"array {key!r} has npy version {version}, not (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.dtype(member.dtype):
        raise ValueError(f"array {key!r} is of {dtype}, not {member.dtype}")
    is_bounded = len(shape) > 0 and 1 <= shape[0] <= member.max_examples
    if not is_bounded or shape[1:] != member.example_shape:
        raise ValueError(
            f"array {key!r} has {math.prod(shape)} elements in shape {shape}; at most "
            f"{member.max_examples} examples of shape {member.example_shape} are allowed"
        )
