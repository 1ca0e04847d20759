"""CIFAR-10 and CIFAR-100 from the user's folder, in the binary format (fixed-size records, no pickle)."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .images import ImageData

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """How a set is published: an archive with one folder of binary files, each a run of labels-and-pixels records."""

    folder: str
    archive: str
    md5: str
    train_files: tuple[str, ...]
    test_file: str
    train_records: int  # in each training file
    test_records: int
    label_ranges: tuple[int, ...]  # of the bytes before the pixels; the last of them is the class

    @property
    def record_bytes(self) -> int:
        return len(self.label_ranges) + PIXELS

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        train = dict.fromkeys(self.train_files, self.train_records * self.record_bytes)
        return {**train, self.test_file: self.test_records * self.record_bytes}


SITE = "https://www.cs.toronto.edu/~kriz/"
LAYOUTS = {
    "cifar10": Layout(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        train_files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test_file="test_batch.bin",
        train_records=10_000,
        test_records=10_000,
        label_ranges=(10,),
    ),
    "cifar100": Layout(
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        train_files=("train.bin",),
        test_file="test.bin",
        train_records=50_000,
        test_records=10_000,
        label_ranges=(20, 100),
    ),
}


def load(name: str, root: str | os.PathLike | None, download: bool = False) -> ImageData:
    """CIFAR-10 or CIFAR-100 (its 100 fine labels): 50,000 training and 10,000 test images ``[3, 32, 32]``.

    ``root`` is the folder of the binary files, or its parent, or the published archive; the archive, found in either
    folder, is unpacked when files are missing. Nothing is downloaded unless ``download`` is true. Flips are on, shifts
    go up to 4 pixels.

    Every file's size and labels are checked, and an archive's MD5 before it is opened.
    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one, ConnectionError for a download
    that fails; existing files are never overwritten.
    """
    layout = LAYOUTS[name]
    if root is None:
        raise ValueError(f"{name} needs root=, the folder that holds {layout.folder} or {layout.archive}")
    folder = _prepare(name, layout, Path(root).expanduser(), download)
    train = [_read(folder / file, layout) for file in layout.train_files]
    images, labels = (torch.cat(part) for part in zip(*train, strict=True))
    test = _read(folder / layout.test_file, layout)
    return ImageData.from_tensors(name, (images, labels), test, classes=layout.label_ranges[-1], flip=True, crop=4)


def _prepare(name: str, layout: Layout, root: Path, download: bool) -> Path:
    """The folder of the set's files, all of them there, unpacked or downloaded if need be."""
    if root.name == layout.archive:
        root = root.parent
    inside = root.name == layout.folder or any((root / file).exists() for file in layout.sizes)
    folder = root if inside else root / layout.folder
    missing = [file for file in layout.sizes if not (folder / file).exists()]
    if not missing:
        return folder
    # "beside" an open folder is its parent, whatever the folder is called; a path such as "." has its parent resolved
    archive = (folder.resolve().parent if inside else root) / layout.archive
    if inside and (folder / layout.archive).exists():
        archive = folder / layout.archive
    if not archive.exists():
        if not download:
            mend = f"put {layout.archive} beside it, or ask for the download (download=True)"
            if len(missing) < len(layout.sizes):
                raise FileNotFoundError(f"{name}: {folder} lacks {', '.join(missing)}: {mend}")
            raise FileNotFoundError(f"{name}: neither {folder / missing[0]} nor {archive} is there: {mend}")
        _download(layout, archive)
    elif (found := _md5(archive)) != layout.md5:
        raise ValueError(f"{archive} is damaged (MD5 {found}, expected {layout.md5}): delete it and fetch it again")
    _unpack(layout, archive, folder, missing)
    return folder


def _read(path: Path, layout: Layout) -> tuple[Tensor, Tensor]:
    """The images (uint8 ``[N, 3, 32, 32]``) and classes (int64 ``[N]``) of one file."""
    size, expected = path.stat().st_size, layout.sizes[path.name]
    if size != expected:
        raise ValueError(
            f"{path} has {size:,} bytes instead of {expected:,}: delete it and unpack {layout.archive} again"
        )
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, layout.record_bytes)
    count = len(layout.label_ranges)
    for labels, limit in zip(records[:, :count].T, layout.label_ranges, strict=True):
        if labels.max() >= limit:
            raise ValueError(
                f"{path} has a label {labels.max()} where {limit - 1} is the largest: it is not a {layout.folder} file;"
                f" delete it and unpack {layout.archive} again"
            )
    images = np.ascontiguousarray(records[:, count:]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(records[:, count - 1].astype(np.int64))


def _unpack(layout: Layout, archive: Path, folder: Path, files: list[str]) -> None:
    """Copies the named files out of the archive into the folder; no other member is looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:gz") as tar:
        members = {member.name: member for member in tar if member.isreg()}
        for file in files:
            member = members.get(f"{layout.folder}/{file}")
            if member is None or member.size != layout.sizes[file]:
                raise ValueError(f"{archive} lacks {file} in its known size: delete it and fetch it again")
            with tar.extractfile(member) as source, _written_beside(folder / file) as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _download(layout: Layout, archive: Path) -> None:
    url = SITE + layout.archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    with _written_beside(archive) as target:
        try:
            with urllib.request.urlopen(url, timeout=60) as source:
                shutil.copyfileobj(source, target, 1 << 20)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"{url} could not be downloaded ({error}): fetch it by hand to {archive}") from error
        target.flush()
        if (found := _md5(target.name)) != layout.md5:
            raise ValueError(f"what {url} sent is damaged (MD5 {found}, expected {layout.md5}): try again")


@contextmanager
def _written_beside(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name ``path`` only once it is whole; on an error it goes away."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.chmod(file.name, 0o644)  # a temporary file starts out readable by its owner alone
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _md5(path: str | Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
