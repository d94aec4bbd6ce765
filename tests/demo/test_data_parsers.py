"""The parsers, held against files that their formats allow and files that they must refuse."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from data_files import idx_gz, npz

from esper_fn.demo.data._idx import parse_idx
from esper_fn.demo.data._npz import Member, parse_npz
from esper_fn.demo.data._text import encode_text, next_character_windows

IMAGES = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)
MEMBERS = {
    "x": Member(dtype="float32", max_examples=4, example_shape=(2,)),
    "y": Member(dtype="uint8", max_examples=4),
}
ARRAYS = {"x": np.arange(6, dtype=np.float32).reshape(3, 2), "y": np.arange(3, dtype=np.uint8)}


def npy(array: np.ndarray, *, shape: tuple[int, ...] | None = None, extra: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    header["shape"] = array.shape if shape is None else shape
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + array.tobytes() + extra


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, content in members.items():
            archive.writestr(f"{key}.npy", content)
    return buffer.getvalue()


def flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 0x10
    return bytes(changed)


class TestIdx:
    @pytest.mark.parametrize("array", [IMAGES, IMAGES[:1], IMAGES[:, 0, 0]])
    def test_returns_what_was_written(self, array: np.ndarray) -> None:
        parsed = parse_idx(idx_gz(array), max_examples=3, example_shape=array.shape[1:])
        np.testing.assert_array_equal(parsed, array, strict=True)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "idx magic"),
            (b"not gzip at all", "not a sound gzip"),
            (gzip.compress(b"\0\0", mtime=0), "idx magic is '0000'"),
            (gzip.compress(b"\0\0\x08\x03\0\0", mtime=0), "header ends after 6 bytes"),
            (idx_gz(IMAGES, type_code=13), "idx magic is '00000d03', not '00000803'"),
            (idx_gz(IMAGES[0]), "idx magic is '00000802'"),
            (idx_gz(IMAGES, shape=(0, 2, 4)), r"dimensions are \(0, 2, 4\)"),
            (idx_gz(IMAGES, shape=(6, 2, 2)), r"dimensions are \(6, 2, 2\)"),
            (idx_gz(IMAGES, shape=(2**32 - 1,) * 3), r"dimensions are \(4294967295, "),
            (idx_gz(IMAGES, shape=(5, 2, 4)), "payload ends after 24 of 40 bytes"),
            (idx_gz(IMAGES, shape=(2, 2, 4)), "goes on after 16 bytes"),
            (idx_gz(IMAGES)[:-9], "not a sound gzip"),
            (idx_gz(IMAGES)[:-5], "not a sound gzip"),
            (flipped(idx_gz(IMAGES), -8), "not a sound gzip"),
            (flipped(idx_gz(IMAGES), 10), "idx magic is '40000803'"),
        ],
    )
    def test_refuses_what_the_format_does_not_allow(self, content: bytes, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            parse_idx(content, max_examples=5, example_shape=(2, 4))

    def test_a_compressed_bomb_is_not_unpacked(self) -> None:
        header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 2, 4)
        bomb = gzip.compress(header + bytes(1 << 26))
        tracemalloc.start()
        with pytest.raises(ValueError, match="goes on after 8 bytes"):
            parse_idx(bomb, max_examples=5, example_shape=(2, 4))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 22


class TestNpz:
    def test_returns_what_was_written(self) -> None:
        parsed = parse_npz(npz(**ARRAYS), MEMBERS)
        assert set(parsed) == set(ARRAYS)
        for key, array in ARRAYS.items():
            np.testing.assert_array_equal(parsed[key], array, strict=True)

    def test_never_unpickles(self) -> None:
        class Planted:
            def __reduce__(self) -> tuple[object, ...]:
                return pytest.fail, ("the pickle was loaded",)

        content = npz(x=np.array([Planted()], dtype=object), y=ARRAYS["y"])
        with pytest.raises(ValueError, match="array 'x' is of object, not float32"):
            parse_npz(content, MEMBERS)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "not a sound npz"),
            (npz(**ARRAYS)[:-30], "not a sound npz"),
            (npz(**ARRAYS)[60:], "negative seek"),
            (npz(x=ARRAYS["x"]), r"holds \['x.npy'\], not \['x.npy', 'y.npy'\]"),
            (npz(**ARRAYS, z=ARRAYS["y"]), "holds .*'z.npy'"),
            (npz(x=ARRAYS["x"].astype(np.float64), y=ARRAYS["y"]), "is of float64, not float32"),
            (npz(x=ARRAYS["x"].astype(">f4"), y=ARRAYS["y"]), "is of >f4, not float32"),
            (npz(x=ARRAYS["x"][:, :1], y=ARRAYS["y"]), r"in shape \(3, 1\)"),
            (npz(x=ARRAYS["x"][:0], y=ARRAYS["y"]), r"in shape \(0, 2\)"),
            (npz(x=ARRAYS["x"], y=np.uint8(1)), r"in shape \(\)"),
            (
                zipped(x=npy(ARRAYS["x"], shape=(2**40, 2)), y=npy(ARRAYS["y"])),
                "at most 4 examples",
            ),
            (zipped(x=npy(ARRAYS["x"], shape=(4, 2)), y=npy(ARRAYS["y"])), "EOF|reading array"),
            (zipped(x=npy(ARRAYS["x"], extra=b"!"), y=npy(ARRAYS["y"])), "goes on after its 24"),
            (zipped(x=b"\x93NUMPY\x02\0", y=npy(ARRAYS["y"])), r"npy version \(2, 0\)"),
            (
                zipped(x=b"\x93NUMPY\x01\0\x04\0{[}\n", y=npy(ARRAYS["y"])),
                "multi-line statement|Cannot parse header",
            ),
            (zipped(x=b"", y=npy(ARRAYS["y"])), "EOF"),
        ],
        # Archives hold the time, and all workers must find the same tests.
        ids=lambda data: data if isinstance(data, str) else f"{len(data)} bytes",
    )
    def test_refuses_what_it_did_not_expect(self, content: bytes, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            parse_npz(content, MEMBERS)

    def test_a_flipped_byte_of_the_payload_is_seen(self) -> None:
        stored = io.BytesIO()
        np.savez(stored, **ARRAYS)
        content = stored.getvalue()
        position = content.index(ARRAYS["x"].tobytes()) + 5
        with pytest.raises(ValueError, match="Bad CRC-32"):
            parse_npz(flipped(content, position), MEMBERS)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_no_damage_raises_anything_else(self, compression: int) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for key, array in ARRAYS.items():
                archive.writestr(f"{key}.npy", npy(array))
        sound = np.frombuffer(buffer.getvalue(), np.uint8)
        rng = np.random.default_rng(0)
        num_refused = 0
        for _ in range(2_000):
            damaged = sound.copy()
            places = rng.integers(0, len(sound), rng.integers(1, 5))
            damaged[places] = rng.integers(0, 256, len(places))
            try:
                parse_npz(damaged.tobytes(), MEMBERS)
            except ValueError:
                num_refused += 1
        assert num_refused > 1_000  # the rest hit dates, permissions and the like

    def test_an_encrypted_member_is_refused(self) -> None:
        content = bytearray(npz(**ARRAYS))
        content[content.index(b"PK\x01\x02") + 8] |= 1
        content[6] |= 1
        with pytest.raises(ValueError, match="encrypted"):
            parse_npz(bytes(content), MEMBERS)


class TestText:
    def test_classes_are_places_in_the_sorted_vocabulary(self) -> None:
        characters, vocabulary = encode_text("bä b🙂a".encode())
        assert vocabulary == (" ", "a", "b", "ä", "🙂")
        np.testing.assert_array_equal(characters, np.array([2, 3, 0, 2, 4, 1], np.int32))
        assert characters.dtype == np.int32

    def test_refuses_what_is_not_utf_8(self) -> None:
        with pytest.raises(ValueError, match="not UTF-8 text"):
            encode_text(b"ab\xff")

    @pytest.mark.parametrize("num_characters", [5, 8, 9, 12, 13])
    def test_windows_follow_each_other(self, num_characters: int) -> None:
        characters = np.arange(num_characters, dtype=np.int32)
        inputs, targets = next_character_windows(characters, context_length=4)
        num_windows = (num_characters - 1) // 4
        assert inputs.shape == targets.shape == (num_windows, 4)
        np.testing.assert_array_equal(inputs.ravel(), characters[: 4 * num_windows])
        np.testing.assert_array_equal(targets, inputs + 1)

    @pytest.mark.parametrize(
        ("num_characters", "context_length", "reason"),
        [(5, 0, "at least 1"), (5, -3, "at least 1"), (5, 5, "at most 4"), (0, 1, "at most 0")],
    )
    def test_refuses_windows_that_do_not_fit(
        self, num_characters: int, context_length: int, reason: str
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            next_character_windows(
                np.arange(num_characters, dtype=np.int32), context_length=context_length
            )
