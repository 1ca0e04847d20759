"""A whole image set in memory, augmented in batches on the device where it lies."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS_CHUNK = 2048  # images at a time: 50 MB of doubles at 3x32x32, instead of 1.2 GB for CIFAR's training set


@dataclass(frozen=True)
class ImageData:
    """Training and test images as uint8 ``[N, C, H, W]`` with int64 labels ``[N]`` in ``0 .. classes - 1``.

    mean, std  of each channel over the training set, pixels taken in 0..1; `normalize` uses them
    flip       whether `augment` mirrors images left to right
    crop       by how many pixels `augment` shifts an image at most, in each direction; zeros come in
    Raises ValueError for tensors of another type or shape, for labels out of range and for a channel without spread.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop: int
    _scale: Tensor = field(init=False, repr=False, compare=False)
    _shift: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            _check_part(
                f"{self.name}, {part}", getattr(self, f"{part}_images"), getattr(self, f"{part}_labels"), self.classes
            )
        channels = self.train_images.shape[1]
        if self.test_images.shape[1:] != self.train_images.shape[1:]:
            shapes = f"{tuple(self.train_images.shape[1:])} and {tuple(self.test_images.shape[1:])}"
            raise ValueError(f"{self.name}: training and test images differ in shape: {shapes}")
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise ValueError(f"{self.name}: needs a mean and a positive std for each of {channels} channels")
        if self.crop < 0:
            raise ValueError(f"{self.name}: crop is a number of pixels, 0 or more, not {self.crop}")
        # kept as tensors, so that no batch waits for a copy to the device
        std = torch.tensor(self.std, dtype=torch.float64)
        mean = torch.tensor(self.mean, dtype=torch.float64)
        for key, value in (("_scale", 1 / (255 * std)), ("_shift", mean / std)):
            object.__setattr__(self, key, value.float().view(1, -1, 1, 1).to(self.train_images.device))

    @classmethod
    def from_tensors(
        cls,
        name: str,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        *,
        classes: int,
        flip: bool = False,
        crop: int = 0,
    ) -> ImageData:
        """A set from ``(images, labels)`` pairs; mean and std are computed from the training images."""
        mean, std = channel_statistics(train[0])
        return cls(name, *train, *test, classes, mean, std, flip, crop)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageData:
        """The same set with its tensors on ``device``."""
        tensors = {
            key: getattr(self, key).to(device) for key in ("train_images", "train_labels", "test_images", "test_labels")
        }
        return dataclasses.replace(self, **tensors)

    def subset(self, train: int | None = None, test: int | None = None) -> ImageData:
        """The first ``train`` training and ``test`` test images (None: all of them); mean and std stay as they are.

        Raises ValueError for a number below 1 or above what is there.
        """
        parts = {}
        for part, count in (("train", train), ("test", test)):
            available = len(getattr(self, f"{part}_images"))
            if count is None:
                continue
            if not 1 <= count <= available:
                raise ValueError(f"{self.name} has {available} {part} images; a subset of {count} is not possible")
            parts[f"{part}_images"] = getattr(self, f"{part}_images")[:count]
            parts[f"{part}_labels"] = getattr(self, f"{part}_labels")[:count]
        return dataclasses.replace(self, **parts)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 ``[N, C, H, W]`` to float32 of that shape; each channel of the training set gets mean 0 and std 1."""
        return images.float().mul_(self._scale.to(images.device)).sub_(self._shift.to(images.device))

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Mirrors each image with probability 1/2 if `flip`, shifts it by up to `crop` pixels each way; zeros come in.

        uint8 ``[N, C, H, W]`` to the same. All draws come from ``generator``, which lies on the images' device: with
        its state restored, the same batch comes out bit for bit. Raises ValueError for a generator elsewhere.
        """
        if not self.flip and not self.crop:
            return images
        device = images.device
        if generator.device.type != device.type:
            raise ValueError(
                f"the generator is on {generator.device} and the images on {device}: create it on {device}"
            )
        count, channels, height, width = images.shape
        rows = torch.arange(height, device=device).expand(count, height)
        columns = torch.arange(width, device=device).expand(count, width)
        if self.flip:
            mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        if self.crop:
            shifts = torch.randint(0, 2 * self.crop + 1, (2, count, 1), generator=generator, device=device)
            rows, columns = rows + shifts[0], columns + shifts[1]
            images = F.pad(images, (self.crop,) * 4)
        # one gather over flat pixels does both; on a CPU it takes a quarter of the time of indexing with four tensors
        pixels = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).view(count, 1, -1)
        flat = images.reshape(count, channels, -1).gather(2, pixels.expand(-1, channels, -1))
        return flat.view(count, channels, height, width)

    def draw(self, count: int, seed: int) -> Tensor:
        """Indices of ``count`` training images (all, where there are fewer), int64, drawn by the seed."""
        drawn = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(seed))[:count]
        return drawn.to(self.train_images.device)

    def plain_batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The training images of ``index`` (int64 ``[B]``), normalized and not augmented, and their labels."""
        index = index.to(self.train_images.device)
        return self.normalize(self.train_images[index]), self.train_labels[index]

    def train_batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The training images of ``index`` (int64 ``[B]``), augmented and normalized, and their labels."""
        index = index.to(self.train_images.device)
        return self.normalize(self.augment(self.train_images[index], generator)), self.train_labels[index]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel of uint8 ``[N, C, H, W]``, pixels taken in 0..1."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in images.split(STATISTICS_CHUNK):
        # whole numbers below 2 ** 53, so exact, and the same for every chunk size and number of threads
        pixels = chunk.double()
        total += pixels.sum((0, 2, 3)).cpu()
        squares += pixels.square_().sum((0, 2, 3)).cpu()
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _check_part(name: str, images: Tensor, labels: Tensor, classes: int) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or not images.numel():
        raise ValueError(f"{name}: images are uint8 [N, C, H, W], not {images.dtype} of shape {tuple(images.shape)}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name}: {len(images)} images need as many int64 labels, not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{name}: labels run from 0 to {classes - 1}, found {low} to {high}")
