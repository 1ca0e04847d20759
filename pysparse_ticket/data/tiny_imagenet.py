"""TinyImageNet from the user's folder: 200 classes of 64x64 images, as JPEG files in the published layout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .images import ImageData

FOLDER = "tiny-imagenet-200"
SIZE = 64


def load(root: str | os.PathLike | None) -> ImageData:
    """TinyImageNet's training images, and its validation images as the test set: ``[3, 64, 64]``, 100,000 and 10,000.

    ``root`` is the folder with ``wnids.txt``, ``train`` and ``val``, or its parent. Classes are numbered in the order
    of their sorted WordNet ids. Grey images get three equal channels. Flips are on, shifts go up to 4 pixels.

    Raises ImportError where Pillow is missing, FileNotFoundError for a missing folder or file, and ValueError for a
    damaged image, an image of another size, a class with fewer images than another or an image of an unknown class.
    """
    if root is None:
        raise ValueError(f"tinyimagenet needs root=, the folder {FOLDER} or the one that holds it")
    folder = Path(root).expanduser()
    if not (folder / "wnids.txt").exists():
        folder /= FOLDER
    if not (folder / "wnids.txt").exists():
        raise FileNotFoundError(f"tinyimagenet: {folder / 'wnids.txt'} is not there: unpack {FOLDER}.zip in {root}")
    classes = sorted((folder / "wnids.txt").read_text().split())
    train = [_of_class(folder, name) for name in classes]
    for name, files in zip(classes, train, strict=True):
        if not files or len(files) < len(max(train, key=len)):
            raise FileNotFoundError(
                f"tinyimagenet: {folder / 'train' / name / 'images'} has {len(files)} images and another class "
                f"{len(max(train, key=len))}: unpack {FOLDER}.zip again"
            )
    test, labels = _annotated(folder, {name: i for i, name in enumerate(classes)})
    train_labels = torch.arange(len(classes)).repeat_interleave(len(train[0]))
    pairs = (_read([f for files in train for f in files]), train_labels), (_read(test), torch.tensor(labels))
    return ImageData.from_tensors("tinyimagenet", *pairs, classes=len(classes), flip=True, crop=4)


def _of_class(folder: Path, name: str) -> list[Path]:
    return sorted((folder / "train" / name / "images").glob("*.JPEG"))


def _annotated(folder: Path, numbers: dict[str, int]) -> tuple[list[Path], list[int]]:
    """The validation images and their classes, from ``val_annotations.txt``: a file name and a WordNet id a line."""
    listing = folder / "val" / "val_annotations.txt"
    if not listing.exists():
        raise FileNotFoundError(f"tinyimagenet: {listing} is not there: unpack {FOLDER}.zip again")
    rows = [line.split("\t")[:2] for line in listing.read_text().splitlines() if line.strip()]
    for row in rows:
        if len(row) < 2 or row[1] not in numbers:
            raise ValueError(f"{listing} has a line without a class of wnids.txt, {row}: unpack {FOLDER}.zip again")
    return [folder / "val" / "images" / name for name, _ in rows], [numbers[name] for _, name in rows]


def _read(files: list[Path]) -> Tensor:
    """uint8 ``[N, 3, 64, 64]``."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("tinyimagenet's JPEG files need Pillow: pip install pysparse-ticket[images]") from error
    images = np.empty((len(files), 3, SIZE, SIZE), dtype=np.uint8)
    for place, file in zip(images, files, strict=True):
        if not file.exists():
            raise FileNotFoundError(f"tinyimagenet: {file} is not there: unpack {FOLDER}.zip again")
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}): unpack {FOLDER}.zip again") from error
        if pixels.shape != (SIZE, SIZE, 3):
            raise ValueError(f"{file} is {pixels.shape[1]}x{pixels.shape[0]} pixels; TinyImageNet has {SIZE}x{SIZE}")
        place[:] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)
