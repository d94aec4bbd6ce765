"""Finds the files of a data set and checks their digests; nothing is downloaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from esper_fn.errors import CorruptDataError, MissingDataError

FOLDER_VARIABLE = "ESPER_DATA"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """A file as its authors publish it."""

    sha256: str
    size_bytes: int
    published_at: str


_FASHION_MNIST = "https://github.com/zalandoresearch/fashion-mnist (folder data/fashion)"

FILES: dict[str, PublishedFile] = {
    "fashion-mnist/train-images-idx3-ubyte.gz": PublishedFile(
        sha256="3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        size_bytes=26_421_880,
        published_at=_FASHION_MNIST,
    ),
    "fashion-mnist/train-labels-idx1-ubyte.gz": PublishedFile(
        sha256="a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        size_bytes=29_515,
        published_at=_FASHION_MNIST,
    ),
    "fashion-mnist/t10k-images-idx3-ubyte.gz": PublishedFile(
        sha256="346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        size_bytes=4_422_102,
        published_at=_FASHION_MNIST,
    ),
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": PublishedFile(
        sha256="67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        size_bytes=5_148,
        published_at=_FASHION_MNIST,
    ),
    "mnist1d/mnist1d.npz": PublishedFile(
        sha256="788bad96470a9973f34c34d7dd86ba6226153e1805b4f573de903d23ec70079f",
        size_bytes=748_266,
        published_at=(
            "https://github.com/greydanus/mnist1d (as mnist1d_data.pkl, a pickle, which is never "
            "loaded here: write its arrays with numpy.savez_compressed(path, x=x, y=y, "
            "x_test=x_test, y_test=y_test), x and x_test as float32, y and y_test as uint8)"
        ),
    ),
    "tinyshakespeare/input.txt": PublishedFile(
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size_bytes=1_115_394,
        published_at="https://github.com/karpathy/char-rnn (data/tinyshakespeare/input.txt)",
    ),
}
"""Every file a loader reads, by its path below a data folder."""


def folders(folder: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    """Returns the folders to search, in order.

    Args:
      folder: the only folder to search; None stands for `$ESPER_DATA` where it is set, then
        the user's cache folder.

    Returns:
      At least one folder; none of them needs to exist.
    """
    if folder is not None:
        return (Path(folder).expanduser(),)
    variable = os.environ.get(FOLDER_VARIABLE)
    # An XDG base folder that is not absolute is to be ignored, says its specification.
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    cache = (base if base.is_absolute() else Path.home() / ".cache") / "esper-fn" / "data"
    return (Path(variable).expanduser(), cache) if variable else (cache,)


def locate(names: Iterable[str], folder: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Returns the path of each file, in the first folder that has it.

    Args:
      names: keys of `FILES`.
      folder: as for `folders`.

    Raises:
      MissingDataError: some file lies in none of the folders; the message names all of them.
    """
    candidates = folders(folder)
    paths = {
        name: next((base / name for base in candidates if (base / name).is_file()), None)
        for name in names
    }
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        published = "; ".join(dict.fromkeys(FILES[name].published_at for name in missing))
        raise MissingDataError(
            f"{', '.join(missing)} not found in {' or '.join(map(str, candidates))}. "
            f"Published at {published}. Put it, under that name, into one of these folders or "
            f"into a folder that ${FOLDER_VARIABLE} names; nothing is downloaded."
        )
    return {name: path for name, path in paths.items() if path is not None}


def read_verified(name: str, path: Path) -> bytes:
    """Returns a file's content once its SHA-256 digest is the published one.

    The bytes that are digested are the bytes that are returned, and no more than the published
    size is ever in memory.

    Args:
      name: a key of `FILES`.
      path: where the file lies.

    Raises:
      CorruptDataError: the digest differs.
    """
    published = FILES[name]
    with path.open("rb") as stream:
        content = stream.read(published.size_bytes + 1)
        digest = hashlib.sha256(content)
        while more := stream.read(1 << 20):
            digest.update(more)
    if digest.hexdigest() != published.sha256:
        raise corrupt(path, name, f"its SHA-256 is {digest.hexdigest()}")
    return content


def corrupt(path: Path, name: str, reason: str) -> CorruptDataError:
    """Returns the error for a file whose content is not what is published under `name`."""
    published = FILES[name]
    return CorruptDataError(
        f"{path} is corrupt: {reason}; expected SHA-256 {published.sha256} of "
        f"{published.size_bytes} bytes. Delete it and fetch it again from {published.published_at}."
    )
