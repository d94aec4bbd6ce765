"""Builders of small files in the published formats."""

from __future__ import annotations

import gzip
import io
import struct

import numpy as np


def idx_gz(array: np.ndarray, *, type_code: int = 8, shape: tuple[int, ...] | None = None) -> bytes:
    shape = array.shape if shape is None else shape
    header = bytes((0, 0, type_code, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def mnist1d_arrays(num_train: int = 540, num_test: int = 30) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((num_train, 40)).astype(np.float32),
        "y": (np.arange(num_train) % 10).astype(np.uint8),
        "x_test": rng.standard_normal((num_test, 40)).astype(np.float32),
        "y_test": (np.arange(num_test) % 10).astype(np.uint8),
    }


def fashion_arrays(num_train: int = 5_060, num_test: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = {}
    for part, num_examples in (("train", num_train), ("t10k", num_test)):
        # Mostly empty so that they compress; the example's number makes every image unique.
        pixels = np.zeros((num_examples, 28, 28), np.uint8)
        pixels[:, 0, 0] = np.arange(num_examples) % 251
        pixels[:, 0, 1] = np.arange(num_examples) // 251
        pixels[:, 5] = rng.integers(0, 256, (num_examples, 28))
        pixels[0, 27, 27] = 255
        images[part, "images-idx3"] = pixels
        images[part, "labels-idx1"] = (np.arange(num_examples) % 10).astype(np.uint8)
    return {
        f"fashion-mnist/{part}-{kind}-ubyte.gz": array for (part, kind), array in images.items()
    }
