"""SVHN's cropped digits from the user's folder, in the published MATLAB files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .images import ImageData

FILES = ("train_32x32.mat", "test_32x32.mat")


def load(root: str | os.PathLike | None) -> ImageData:
    """SVHN: 73,257 training and 26,032 test images ``[3, 32, 32]`` of ten digits; no flips, shifts up to 4 pixels.

    ``root`` is the folder of ``train_32x32.mat`` and ``test_32x32.mat``, or the one that holds it as ``svhn``. Raises
    ImportError where scipy is missing, FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    if root is None:
        raise ValueError(f"svhn needs root=, the folder that holds {' and '.join(FILES)}")
    return ImageData.from_tensors("svhn", *(_read(Path(root).expanduser(), file) for file in FILES), classes=10, crop=4)


def _read(root: Path, file: str) -> tuple[Tensor, Tensor]:
    """Images (uint8 ``[N, 3, 32, 32]``) and digits (int64 ``[N]``) of one file, which calls the digit 0 ten."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("svhn's MATLAB files need scipy: pip install scipy") from error
    path = root / file if (root / file).exists() else root / "svhn" / file
    if not path.exists():
        raise FileNotFoundError(f"svhn: neither {root / file} nor {path} is there: put both MATLAB files in {root}")
    try:
        content = loadmat(path)
        images, digits = content["X"], content["y"].reshape(-1)
        images = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    except Exception as error:  # loadmat lets anything out that its parser trips over
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    return torch.from_numpy(images), torch.from_numpy(digits.astype(np.int64) % 10)
