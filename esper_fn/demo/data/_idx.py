"""Parses the idx format of the MNIST family: a big-endian header and unsigned bytes, gzipped.

The header is four bytes (0, 0, type, number of dimensions) and one 32-bit size a dimension.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib

import numpy as np
from jaxtyping import UInt8

_UNSIGNED_BYTE = 0x08


def parse_idx(
    content: bytes, *, max_examples: int, example_shape: tuple[int, ...]
) -> UInt8[np.ndarray, "N ..."]:
    """Returns the array in a gzipped idx file of unsigned bytes.

    Sizes are checked against their bounds before any of the array is unpacked.

    Args:
      content: the gzipped file.
      max_examples: the largest first dimension.
      example_shape: the other dimensions, exactly.

    Raises:
      ValueError: the content is anything else; the message says what it is.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            shape = _read_shape(stream, max_examples, example_shape)
            num_bytes = math.prod(shape)
            payload = stream.read(num_bytes)
            if len(payload) != num_bytes:
                raise ValueError(f"idx payload ends after {len(payload)} of {num_bytes} bytes")
            if stream.read(1):  # reading to the end also checks gzip's own checksum
                raise ValueError(f"idx payload goes on after {num_bytes} bytes")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"it is not a sound gzip file ({error})") from error
    return np.frombuffer(payload, np.uint8).reshape(shape)


def _read_shape(
    stream: gzip.GzipFile, max_examples: int, example_shape: tuple[int, ...]
) -> tuple[int, ...]:
    num_dims = 1 + len(example_shape)
    magic = bytes((0, 0, _UNSIGNED_BYTE, num_dims))
    header = stream.read(len(magic) + 4 * num_dims)
    if header[:4] != magic:
        raise ValueError(f"idx magic is {header[:4].hex()!r}, not {magic.hex()!r}")
    if len(header) != len(magic) + 4 * num_dims:
        raise ValueError(f"idx header ends after {len(header)} bytes")
    shape = struct.unpack(f">{num_dims}I", header[4:])
    if not 1 <= shape[0] <= max_examples or shape[1:] != example_shape:
        raise ValueError(
            f"idx dimensions are {shape}; at most {max_examples} examples of shape "
            f"{example_shape} are allowed"
        )
    return shape
