"""Test sets shifted from CIFAR-10's, from the user's folder: CIFAR-10-C and CIFAR-10.2, which nobody trains on."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
IMAGE = (32, 32, 3)
SEVERITIES = 5
FOLDER, ARCHIVE = "CIFAR-10-C", "CIFAR-10-C.tar"
# the fifteen of Hendrycks and Dietterich 2019 that are averaged; the four others of the archive are for validation
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
FILE, CHECKOUT = "cifar102_test.npz", "cifar-10.2"


@dataclass(frozen=True)
class Corrupted:
    """One corruption of a test set of N images: uint8 ``[5 N, H, W, C]``, the N of severity 1 first, then those of 2 to
    5, and int64 labels ``[5 N]``. ``images`` may be a memory map: no more than one severity is read at a time."""

    name: str
    images: np.ndarray
    labels: Tensor

    def severity(self, level: int) -> tuple[Tensor, Tensor]:
        """Images (uint8 ``[N, C, H, W]``) and labels (int64 ``[N]``) of severity 1 to 5; ValueError for another."""
        if not 1 <= level <= SEVERITIES:
            raise ValueError(f"severities run from 1 to {SEVERITIES}, not {level}")
        count = len(self.labels) // SEVERITIES
        part = slice((level - 1) * count, level * count)
        return _channels_first(self.images[part]), self.labels[part]


def cifar10_c(root: str | os.PathLike | None, names: tuple[str, ...] = CORRUPTIONS) -> list[Corrupted]:
    """CIFAR-10-C (Hendrycks and Dietterich 2019): each of its fifteen corruptions, or ``names``, memory-mapped.

    ``root`` is the folder of ``labels.npy`` and one ``<corruption>.npy`` each, or the one that holds it as
    ``CIFAR-10-C``. Every file's type and shape is checked before anything is returned. Raises FileNotFoundError for a
    missing file, ValueError for a damaged one or one that belongs to another set.
    """
    if root is None:
        raise ValueError(f"CIFAR-10-C needs root=, the folder {FOLDER} or the one that holds it")
    folder = Path(root).expanduser()
    folder = folder if (folder / "labels.npy").exists() else folder / FOLDER
    labels = _array(folder / "labels.npy", root)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or len(labels) % SEVERITIES:
        raise ValueError(
            f"{folder / 'labels.npy'} holds {labels.dtype} of shape {labels.shape} and not {SEVERITIES} blocks of"
            f" labels: unpack {ARCHIVE} again"
        )
    classes = _classes(labels, folder / "labels.npy", f"unpack {ARCHIVE} again")
    found = []
    for name in names:
        images = _array(folder / f"{name}.npy", root)
        if images.dtype != np.uint8 or images.shape != (len(labels), *IMAGE):
            raise ValueError(
                f"{folder / name}.npy holds {images.dtype} of shape {images.shape} where {len(labels)} labels ask for"
                f" uint8 of {(len(labels), *IMAGE)}: unpack {ARCHIVE} again"
            )
        found.append(Corrupted(name, images, classes))
    return found


def cifar10_2(root: str | os.PathLike | None) -> tuple[Tensor, Tensor]:
    """CIFAR-10.2's test part (Lu et al. 2020): 2,000 images (uint8 ``[N, 3, 32, 32]``) and labels (int64 ``[N]``).

    ``root`` is the folder of ``cifar102_test.npz``, or the one that holds it as ``cifar-10.2``. Raises
    FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    if root is None:
        raise ValueError(f"CIFAR-10.2 needs root=, the folder that holds {FILE}")
    root = Path(root).expanduser()
    path = root / FILE if (root / FILE).exists() else root / CHECKOUT / FILE
    if not path.exists():
        raise FileNotFoundError(f"CIFAR-10.2: neither {root / FILE} nor {path} is there: put {FILE} in {root}")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            images, labels = content["images"], content["labels"]
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    if images.dtype != np.uint8 or images.shape != (len(images), *IMAGE) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path} holds images of shape {images.shape} and labels of shape {labels.shape}, not N images of {IMAGE}"
            f" and as many labels: fetch it again"
        )
    return _channels_first(images), _classes(labels, path, "fetch it again")


def _array(path: Path, root: str | os.PathLike) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"{FOLDER}: {path} is not there: unpack {ARCHIVE} in {root}")
    try:
        return np.lib.format.open_memmap(path, mode="r")  # reads no pickles, whatever the file says
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): unpack {ARCHIVE} again") from error


def _classes(labels: np.ndarray, path: Path, mend: str) -> Tensor:
    if labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{path} has labels other than 0 to {CLASSES - 1}: {mend}")
    return torch.from_numpy(labels.astype(np.int64))


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))  # a copy: a map cannot be written to
