"""Loading: what comes out, where files are looked for, and every way it can fail."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_files import fashion_arrays, idx_gz, mnist1d_arrays, npz

from esper_fn import errors
from esper_fn.demo import data
from esper_fn.demo.data import _files

WITH_FILES = ("fashion-mnist", "mnist1d", "shakespeare")
FILES_OF = {
    name: [file for file in _files.FILES if file.startswith(folder + "/")]
    for name, folder in zip(
        WITH_FILES, ("fashion-mnist", "mnist1d", "tinyshakespeare"), strict=True
    )
}
NAME_OF = {file: name for name, files in FILES_OF.items() for file in files}
TRAIN_IMAGES = "fashion-mnist/train-images-idx3-ubyte.gz"
TEST_IMAGES = "fashion-mnist/t10k-images-idx3-ubyte.gz"
TEST_LABELS = "fashion-mnist/t10k-labels-idx1-ubyte.gz"
SPLITS = ("train", "validation", "test")
REAL_FOLDERS = [
    Path(folder)
    for folder in (
        os.environ.get("ESPER_DATA") or "",
        Path(__file__).resolve().parents[3] / "shared" / "data",
    )
    if str(folder) and (Path(folder) / "SHA256SUMS").is_file()
]


def rows(dataset: data.Dataset, split: str) -> set[bytes]:
    return {row.tobytes() for row in getattr(dataset, f"{split}_inputs")}


def sizes(dataset: data.Dataset) -> tuple[int, ...]:
    return tuple(len(getattr(dataset, f"{split}_targets")) for split in SPLITS)


class TestSurface:
    def test_public_names(self) -> None:
        assert data.__all__ == ["Dataset", "Task", "batch_indices", "load", "names"]
        assert data.names() == ("digits", *WITH_FILES)

    def test_jax_stays_out(self) -> None:
        code = "import esper_fn.demo.data, sys; print('jax' in sys.modules)"
        printed = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        assert printed.strip() == "False"

    def test_errors_are_one_tree(self) -> None:
        assert issubclass(errors.DataError, errors.EsperError)
        for error, builtin in (
            (errors.UnknownDatasetError, ValueError),
            (errors.MissingDataError, FileNotFoundError),
            (errors.CorruptDataError, ValueError),
        ):
            assert issubclass(error, errors.DataError)
            assert issubclass(error, builtin)

    def test_table_agrees_with_the_published_sums(self) -> None:
        for published in _files.FILES.values():
            assert len(bytes.fromhex(published.sha256)) == 32
        for folder in REAL_FOLDERS:
            lines = (line.split() for line in (folder / "SHA256SUMS").read_text().splitlines())
            sums = {name: digest for digest, name in lines if not name.endswith("LICENSE")}
            assert sums == {name: file.sha256 for name, file in _files.FILES.items()}


class TestDigits:
    def test_shapes_and_split(self) -> None:
        digits = data.load("digits")
        assert digits.task == "classification"
        assert sizes(digits) == (1_200, 237, 360)
        assert digits.input_shape == (64,)
        assert digits.num_classes == 10
        assert digits.train_inputs.min() == 0
        assert digits.train_inputs.max() == 1
        # No two of its 1,797 images are alike.
        assert len(set.union(*(rows(digits, split) for split in SPLITS))) == 1_797

    def test_split_is_stratified(self) -> None:
        digits = data.load("digits")
        for split in SPLITS:
            counts = np.bincount(getattr(digits, f"{split}_targets"))
            assert counts.max() - counts.min() <= 0.06 * counts.sum() / 10 + 2

    def test_split_is_the_one_of_every_release(self) -> None:
        digits = data.load("digits")
        digests = {
            split: hashlib.sha256(
                getattr(digits, f"{split}_inputs").astype("<f4").tobytes()
                + getattr(digits, f"{split}_targets").astype("<i4").tobytes()
            ).hexdigest()[:12]
            for split in SPLITS
        }
        assert digests == {
            "train": "ff2cee1ad293",
            "validation": "1336bbe6e36a",
            "test": "31899533f042",
        }

    def test_says_how_to_get_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(errors.MissingDataError, match=r"pip install 'esper-fn\[cli\]'"):
            data.load("digits")


@pytest.mark.usefixtures("data_folder")
class TestFiles:
    @pytest.mark.parametrize(
        ("name", "input_shape", "num_examples"),
        [
            ("fashion-mnist", (28, 28, 1), (60, 5_000, 20)),
            ("mnist1d", (40,), (40, 500, 30)),
            ("shakespeare", (64,), (85, 4, 4)),
        ],
    )
    def test_shapes_and_types(
        self, name: str, input_shape: tuple[int, ...], num_examples: tuple[int, ...]
    ) -> None:
        dataset = data.load(name)
        is_text = name == "shakespeare"
        assert dataset.name == name
        assert dataset.task == ("language_model" if is_text else "classification")
        assert dataset.input_shape == input_shape
        assert sizes(dataset) == num_examples
        for split in SPLITS:
            inputs, targets = (
                getattr(dataset, f"{split}_{part}") for part in ("inputs", "targets")
            )
            assert inputs.dtype == (np.int32 if is_text else np.float32)
            assert inputs.shape[1:] == input_shape
            assert targets.dtype == np.int32
            assert targets.shape == (inputs.shape if is_text else inputs.shape[:1])

    @pytest.mark.parametrize("name", WITH_FILES)
    def test_loads_the_same_twice(self, name: str) -> None:
        first, second = data.load(name), data.load(name)
        for split in SPLITS:
            for part in ("inputs", "targets"):
                left, right = (getattr(loaded, f"{split}_{part}") for loaded in (first, second))
                np.testing.assert_array_equal(left, right, strict=True)

    @pytest.mark.parametrize("name", ["fashion-mnist", "mnist1d"])
    def test_splits_are_disjoint_and_complete(self, name: str) -> None:
        dataset = data.load(name)
        parts = [rows(dataset, split) for split in SPLITS]
        # No two images of the fixtures' training files are alike.
        assert len(parts[0] | parts[1]) == sum(sizes(dataset)[:2])
        assert not parts[0] & parts[1]
        if name == "mnist1d":
            assert not (parts[0] | parts[1]) & parts[2]

    def test_pixels_stay_with_their_labels(self) -> None:
        dataset = data.load("fashion-mnist")
        for split in ("train", "validation"):
            pixels = np.rint(getattr(dataset, f"{split}_inputs")[:, 0, :2, 0] * 255)
            number = pixels[:, 0] + 251 * pixels[:, 1]
            np.testing.assert_array_equal(number % 10, getattr(dataset, f"{split}_targets"))
        np.testing.assert_array_equal(dataset.test_targets, np.arange(20) % 10)
        assert dataset.test_inputs.max() == 1

    def test_text_is_split_in_order_and_can_be_read_back(self, data_folder: Path) -> None:
        dataset = data.load("shakespeare", context_length=10)
        text = (data_folder / "tinyshakespeare" / "input.txt").read_text()
        assert dataset.vocabulary == tuple(sorted(set(text)))
        assert dataset.num_classes == len(dataset.vocabulary)
        ends = [len(text) * 9 // 10, len(text) * 19 // 20, len(text)]
        for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False):
            for part, shift in (("inputs", 0), ("targets", 1)):
                classes = getattr(dataset, f"{split}_{part}")
                read = "".join(dataset.vocabulary[k] for k in classes.ravel())
                assert read == text[start + shift : start + shift + len(read)]
                assert end - 11 <= start + len(read) < end

    @pytest.mark.parametrize("context_length", [0, -1, 10_000])
    def test_refuses_a_context_length_that_does_not_fit(self, context_length: int) -> None:
        with pytest.raises(ValueError, match=f"context_length={context_length}") as caught:
            data.load("shakespeare", context_length=context_length)
        assert not isinstance(caught.value, errors.EsperError)


class TestFolders:
    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("ESPER_DATA", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def test_the_argument_stands_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ESPER_DATA", "/elsewhere")
        assert _files.folders(tmp_path) == (tmp_path,)
        assert _files.folders("~/data") == (tmp_path / "home" / "data",)

    def test_the_variable_comes_before_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = tmp_path / "home" / ".cache" / "esper-fn" / "data"
        assert _files.folders(None) == (cache,)
        monkeypatch.setenv("ESPER_DATA", "")
        assert _files.folders(None) == (cache,)
        monkeypatch.setenv("ESPER_DATA", "~/mine")
        assert _files.folders(None) == (tmp_path / "home" / "mine", cache)

    @pytest.mark.parametrize(
        ("base", "parent"), [("{tmp}/xdg", "{tmp}/xdg"), ("", "{tmp}/home/.cache")]
    )
    def test_the_cache_follows_xdg(
        self, base: str, parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", base.format(tmp=tmp_path))
        expected = Path(parent.format(tmp=tmp_path)) / "esper-fn" / "data"
        assert _files.folders(None) == (expected,)
        monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
        assert _files.folders(None) == (tmp_path / "home/.cache/esper-fn/data",)

    def test_a_file_may_lie_in_either_folder(
        self, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved = tmp_path / "home/.cache/esper-fn/data/mnist1d/mnist1d.npz"
        moved.parent.mkdir(parents=True)
        (data_folder / "mnist1d/mnist1d.npz").rename(moved)
        monkeypatch.setenv("ESPER_DATA", str(data_folder))
        assert data.load("mnist1d").name == "mnist1d"
        with pytest.raises(errors.MissingDataError):
            data.load("mnist1d", folder=data_folder)


class TestFailures:
    def test_unknown_name(self) -> None:
        with pytest.raises(
            errors.UnknownDatasetError,
            match="name='mnist' is no dataset; choose one of digits, fashion-mnist, mnist1d, shak",
        ):
            data.load("mnist")

    @pytest.mark.parametrize("name", WITH_FILES)
    def test_missing_names_files_folders_source_and_remedy(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ESPER_DATA", str(tmp_path / "mine"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        with pytest.raises(errors.MissingDataError) as caught:
            data.load(name)
        message = str(caught.value)
        for file in FILES_OF[name]:
            assert file in message
            assert _files.FILES[file].published_at in message
        for said in (str(tmp_path / "mine"), str(tmp_path / "cache/esper-fn/data"), "$ESPER_DATA"):
            assert said in message

    def test_missing_names_only_what_is_missing(self, data_folder: Path) -> None:
        (data_folder / "fashion-mnist/t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(errors.MissingDataError, match=r"^fashion-mnist/t10k-labels\S* not fou"):
            data.load("fashion-mnist")

    @pytest.mark.parametrize("file", NAME_OF)
    @pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "longer"])
    def test_a_digest_that_differs(self, file: str, damage: str, data_folder: Path) -> None:
        path = data_folder / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        damaged = {
            "flipped": bytes(content),
            "truncated": path.read_bytes()[:-1],
            "empty": b"",
            "longer": path.read_bytes() + bytes(3 << 20),
        }[damage]
        path.write_bytes(damaged)
        with pytest.raises(errors.CorruptDataError) as caught:
            data.load(NAME_OF[file])
        message = str(caught.value)
        digest = hashlib.sha256(damaged).hexdigest()
        for said in (str(path), digest, _files.FILES[file].sha256, "Delete it and fetch it again"):
            assert said in message

    @pytest.mark.parametrize(
        ("file", "content", "reason"),
        [
            (TRAIN_IMAGES, b"no gzip", "not a sound gzip"),
            (TRAIN_IMAGES, idx_gz(np.zeros((1, 28, 28)), shape=(2**32 - 1, 28, 28)), "4294967295"),
            (TEST_IMAGES, idx_gz(np.zeros((9, 28, 27))), "27"),
            (TEST_LABELS, idx_gz(np.zeros(19)), "19 labels for 20"),
            (TEST_LABELS, idx_gz(np.zeros(21)), "at most 20"),
            (TEST_LABELS, idx_gz(np.full(20, 10)), "label 10 is not"),
            ("tinyshakespeare/input.txt", b"\xff\xfe", "not UTF-8"),
        ],
    )
    def test_a_file_that_its_format_does_not_allow(
        self,
        file: str,
        content: bytes,
        reason: str,
        data_folder: Path,
        plant: Callable[..., Path],
    ) -> None:
        path = plant(file, content)
        with pytest.raises(errors.CorruptDataError, match=reason) as caught:
            data.load(NAME_OF[file], folder=data_folder)
        assert str(path) in str(caught.value)
        assert "Delete it" in str(caught.value)

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"y": np.zeros(539, np.uint8)}, "539 labels for 540"),
            ({"y_test": np.full(30, 12, np.uint8)}, "label 12 is not below 10"),
            ({"x": np.full((540, 40), np.nan, np.float32)}, "'x' holds values that are not finite"),
            ({"x": np.zeros((540, 41), np.float32)}, r"\(540, 41\)"),
            ({"x": np.array([{}], dtype=object)}, "is of object"),
            ({"other": np.zeros(1)}, "other.npy"),
        ],
    )
    def test_an_npz_that_is_not_mnist1d(
        self,
        changed: dict[str, np.ndarray],
        reason: str,
        tmp_path: Path,
        plant: Callable[..., Path],
    ) -> None:
        plant("mnist1d/mnist1d.npz", npz(**{**mnist1d_arrays(), **changed}))
        with pytest.raises(errors.CorruptDataError, match=reason):
            data.load("mnist1d", folder=tmp_path / "data")

    def test_a_folder_in_the_place_of_a_file_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "mnist1d/mnist1d.npz").mkdir(parents=True)
        with pytest.raises(errors.MissingDataError):
            data.load("mnist1d", folder=tmp_path)


@pytest.mark.parametrize("folder", REAL_FOLDERS[:1])
@pytest.mark.parametrize(
    ("name", "num_examples"),
    [
        ("fashion-mnist", (55_000, 5_000, 10_000)),
        ("mnist1d", (3_500, 500, 1_000)),
        ("shakespeare", (15_685, 871, 871)),
    ],
)
def test_published_files(name: str, num_examples: tuple[int, ...], folder: Path) -> None:
    dataset = data.load(name, folder=folder)
    assert sizes(dataset) == num_examples
    assert dataset.num_classes == (65 if name == "shakespeare" else 10)
    if name != "shakespeare":
        parts = [rows(dataset, split) for split in SPLITS]
        assert sum(map(len, parts)) == len(set.union(*parts)) == sum(num_examples)
    if name == "fashion-mnist":
        assert np.bincount(dataset.validation_targets).tolist() == [500] * 10


def test_fixtures_have_the_published_files() -> None:
    assert set(fashion_arrays()) == set(FILES_OF["fashion-mnist"])
