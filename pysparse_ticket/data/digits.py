"""scikit-learn's digits: 1797 real images of handwritten digits, 8x8, shipped with that package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import ImageData

SIZES = (8, 16, 32)
TEST_IMAGES = 360
CLASSES = 10


def load(size: int = 8, seed: int = 0) -> ImageData:
    """1437 training and 360 test images ``[1, size, size]`` of ten classes.

    The split is stratified and depends on ``seed`` alone. Sizes 16 and 32 are interpolated bilinearly. No flip (a
    mirrored digit is none); shifts of up to ``size // 8`` pixels. Raises ImportError where scikit-learn is missing and
    ValueError for a size other than 8, 16 or 32.
    """
    if size not in SIZES:
        raise ValueError(f"digits come in the sizes {', '.join(map(str, SIZES))}, not {size}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install pysparse-ticket[demo]") from error
    raw = load_digits()
    labels = torch.from_numpy(raw.target).long()
    images = torch.from_numpy(raw.images).float()[:, None]
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = (images * (255 / 16)).round().to(torch.uint8)
    test = stratified(labels, TEST_IMAGES, torch.Generator().manual_seed(seed))
    return ImageData.from_tensors(
        "digits", (images[~test], labels[~test]), (images[test], labels[test]), classes=CLASSES, crop=size // 8
    )


def stratified(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A bool mask ``[N]`` of ``count`` examples drawn at random, each class by its share of ``labels`` (int64 ``[N]``).

    What rounding down leaves over goes to the classes with the largest remainders, the smaller class number first.
    """
    sizes = torch.bincount(labels)
    share = sizes * count
    quota = share // len(labels)
    order = (share % len(labels)).argsort(descending=True, stable=True)
    quota[order[: count - int(quota.sum())]] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, take in enumerate(quota.tolist()):
        members = (labels == label).nonzero()[:, 0]
        chosen[members[torch.randperm(len(members), generator=generator)[:take]]] = True
    return chosen
