"""MNIST from the user's folder, in the published IDX format, packed or not."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .images import ImageData

FILES = (  # training, test
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
FOLDERS = ("", "MNIST/raw", "mnist")  # below root; the second is torchvision's
PIXELS, LABELS = 2051, 2049  # the first word of a file


def load(root: str | os.PathLike | None) -> ImageData:
    """MNIST: 60,000 training and 10,000 test images ``[1, 28, 28]`` of ten classes, neither flipped nor shifted.

    ``root`` is the folder of the four IDX files, as they are or gzipped, or the one that holds it as ``MNIST/raw``.
    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    if root is None:
        raise ValueError(f"mnist needs root=, the folder that holds {FILES[0][0]} and the like")
    parts = []
    for images, labels in FILES:
        pixels, classes = _read(root, images, PIXELS), _read(root, labels, LABELS)
        parts.append((pixels[:, None], classes.long()))
    return ImageData.from_tensors("mnist", *parts, classes=10)


def _read(root: str | os.PathLike, name: str, magic: int) -> Tensor:
    """The uint8 array of one file: big-endian words for the magic number and each size, then the bytes."""
    below = [Path(root).expanduser() / folder / f"{name}{end}" for folder in FOLDERS for end in ("", ".gz")]
    path = next((path for path in below if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"mnist: neither {below[0]} nor {below[1]} is there: put the four IDX files in {root}")
    try:
        blob = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    words = magic % 256 + 1  # the magic number's last byte counts the dimensions
    header = np.frombuffer(blob, dtype=">u4", count=words).tolist() if len(blob) >= 4 * words else [0]
    if header[0] != magic or len(blob) != 4 * words + int(np.prod(header[1:])):
        raise ValueError(f"{path} is no whole IDX file of {'images' if magic == PIXELS else 'labels'}: fetch it again")
    return torch.from_numpy(np.frombuffer(blob, np.uint8, offset=4 * words).reshape(header[1:]).copy())
