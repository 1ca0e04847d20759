"""A procedural set of ten classes of shapes and textures: any number of images, the same bits for the same seed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .images import ImageData

CHUNK = 200  # images drawn together; each chunk has a seed of its own, so image i is the same in a set of any length
STREAMS = {"train": 0, "test": 1}
BARS = 6


def load(train: int = 50_000, test: int = 10_000, size: int = 32, difficulty: float = 0.5, seed: int = 0) -> ImageData:
    """``train`` and ``test`` images ``[3, size, size]``; label i is ``i % 10`` in both, so any first n are balanced.

    ``difficulty`` in [0, 1] sets how far position, scale, rotation, phase, polarity and colour wander, how strong the
    clutter around and above the object is, and how strong the noise. Image i depends on seed, size and difficulty
    alone, not on how many are asked for; the same bits come out on one machine and version of torch. Flips are on
    (every class is its own mirror image), shifts go up to ``size // 8`` pixels.
    Raises ValueError for a count below 1, a size below 8 or a difficulty outside [0, 1].
    """
    if min(train, test) < 1:
        raise ValueError(f"a procedural set needs at least 1 training and 1 test image, not {train} and {test}")
    if size < 8:
        raise ValueError(f"procedural images are at least 8x8 pixels, not {size}x{size}")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is between 0 and 1, not {difficulty}")
    parts = [draw(count, size, difficulty, seed, STREAMS[part]) for part, count in (("train", train), ("test", test))]
    return ImageData.from_tensors("procedural", *parts, classes=len(RULES), flip=True, crop=size // 8)


def draw(count: int, size: int, difficulty: float, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images (uint8 ``[count, 3, size, size]``) and labels (int64 ``[count]``) of one stream."""
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for number, part in enumerate(images.split(CHUNK)):
        state = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        part.copy_(_chunk(size, difficulty, generator)[: len(part)])
    return images, torch.arange(count) % len(RULES)


def _chunk(size: int, difficulty: float, generator: torch.Generator) -> Tensor:
    """CHUNK images, uint8 ``[CHUNK, 3, size, size]``, image i of class ``i % 10``."""
    wander = difficulty * (1.5 - 0.5 * difficulty)  # rises early: from the middle on a few convolutions no longer do
    canvas = _Canvas(size, generator)
    uniform = canvas.uniform
    labels = torch.arange(CHUNK) % len(RULES)
    scale = uniform(0.85 - 0.5 * wander, 0.9, 1, 1)
    mask = canvas.objects(labels, scale, wander, room=wander)
    # the lure is of another class, each as likely, about half as large and of the same colour
    others = (labels + uniform(1, len(RULES)).long()) % len(RULES)
    lure = canvas.objects(others, scale * (0.45 + 0.2 * wander), wander, room=1.0) * wander

    # an object at least `contrast` away from its ground in each channel, brighter or (with growing difficulty) darker
    contrast = 0.75 - 0.5 * wander
    darker = uniform(0, 1, 1) < wander / 2
    low = uniform(0, 1, 3) * (1 - contrast)
    high = low + contrast + uniform(0, 1, 3) * (1 - contrast - low)
    ground, paint = (torch.where(darker, *pair)[:, :, None, None] for pair in ((high, low), (low, high)))

    waves = torch.sin(
        canvas.bearing(uniform(0, math.pi, 1, 1)) * uniform(3, 12, 1, 1) + uniform(-math.pi, math.pi, 1, 1)
    )
    image = ground + (waves * uniform(0, 0.3, 1, 1) * wander)[:, None]
    image = image + lure[:, None] * (paint - image)
    for number in range(BARS):
        if number == BARS // 2:
            image = image + mask[:, None] * (paint - image)
        bar = canvas.bar() * uniform(0, 1, 1, 1) * wander
        image = image + bar[:, None] * (uniform(0, 1, 3, 1, 1) - image)
    image = image + torch.randn(image.shape, generator=generator) * (0.02 + 0.15 * wander)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


class _Canvas:
    """Draws masks ``[CHUNK, size, size]``, 1 where something covers the pixel; x and y run from -1 to 1."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        axis = (torch.arange(size) + 0.5) * (2 / size) - 1
        self.x, self.y = axis.view(1, 1, size), axis.view(1, size, 1)
        self.edge = 2 / size  # one pixel: masks fade over it
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """``[CHUNK, *shape]``, uniform between the two."""
        return torch.rand(CHUNK, *shape, generator=self.generator) * (high - low) + low

    def bearing(self, angle: Tensor) -> Tensor:
        """How far each pixel lies from the image's centre in the direction of ``angle``."""
        return self.x * angle.cos() + self.y * angle.sin()

    def bar(self) -> Tensor:
        """A bar of any place and direction."""
        middle, angle = self.uniform(-1, 1, 2, 1, 1), self.uniform(0, math.pi, 1, 1)
        length, width = self.uniform(0.1, 0.7, 1, 1), self.uniform(0.04, 0.12, 1, 1)
        x, y, cos, sin = self.x - middle[:, 0], self.y - middle[:, 1], angle.cos(), angle.sin()
        along, across = x * cos + y * sin, y * cos - x * sin
        return _inside(torch.maximum(along.abs() - length, across.abs() - width), self.edge)

    def objects(self, labels: Tensor, scale: Tensor, wander: float, room: float) -> Tensor:
        """An object of each label's rule, of half-width ``scale``, up to ``room`` of the way to the border."""
        uniform = self.uniform
        center = uniform(-1, 1, 2, 1, 1) * (room * (1 - scale) + 0.02)[:, None]
        turn = uniform(-1, 1, 1, 1) * (0.03 + 0.35 * wander)
        phase = uniform(-math.pi, math.pi, 2, 1, 1) * min(1.0, 0.1 + 1.8 * wander)
        rate = uniform(1 - 0.3 * wander, 1 + 0.3 * wander, 1, 1)
        side = torch.where(uniform(0, 1, 1, 1) < 0.5, -1.0, 1.0)
        x, y = (self.x - center[:, 0]) / scale, (self.y - center[:, 1]) / scale
        u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
        mask = torch.empty_like(u)
        for label, rule in enumerate(RULES):
            own = (labels == label).nonzero()[:, 0]
            mask[own] = rule(u[own], v[own], self.edge / scale[own], phase[own], rate[own], side[own])
        return mask


def _inside(distance: Tensor, edge: float | Tensor) -> Tensor:
    """1 where the signed distance is negative, 0 outside, linear over one pixel between."""
    return (0.5 - distance / edge).clamp(0, 1)


def _waves(value: Tensor) -> Tensor:
    return 0.5 + 0.5 * value.sin()


def _disc(u: Tensor, v: Tensor, edge: Tensor) -> Tensor:
    return _inside((u.square() + v.square()).sqrt() - 1, edge)


def _level_stripes(u, v, edge, phase, rate, side):
    return _disc(u, v, edge) * _waves(9 * rate * v + phase[:, 0])


def _upright_stripes(u, v, edge, phase, rate, side):
    return _disc(u, v, edge) * _waves(9 * rate * u + phase[:, 0])


def _checkers(u, v, edge, phase, rate, side):
    return _disc(u, v, edge) * (0.5 + 0.5 * (7 * rate * u + phase[:, 0]).sin() * (7 * rate * v + phase[:, 1]).sin())


def _dots(u, v, edge, phase, rate, side):
    return _disc(u, v, edge) * (_waves(9 * rate * u + phase[:, 0]) * _waves(9 * rate * v + phase[:, 1])).square()


def _rings(u, v, edge, phase, rate, side):
    radius = (u.square() + v.square()).sqrt()
    return _disc(u, v, edge) * _waves(10 * rate * radius + phase[:, 0])


def _spiral(u, v, edge, phase, rate, side):
    radius = (u.square() + v.square()).sqrt()
    return _disc(u, v, edge) * _waves(10 * rate * radius + side * torch.atan2(v, u) + phase[:, 0])


def _plus(u, v, edge, phase, rate, side):
    thin, long = torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    return _inside(torch.maximum(thin - 0.2 * rate, long - 0.95), edge)


def _saltire(u, v, edge, phase, rate, side):
    half = math.sqrt(0.5)
    return _plus((u + v) * half, (v - u) * half, edge, phase, rate, side)


def _frame(u, v, edge, phase, rate, side):
    far = torch.maximum(u.abs(), v.abs())
    return _inside((far - 0.6).abs() - 0.18 * rate, edge)


def _triangle(u, v, edge, phase, rate, side):
    far = torch.maximum(v - 0.55, 0.866 * u.abs() - 0.5 * v - 0.5)
    return _inside((far + 0.15).abs() - 0.18 * rate, edge)


RULES = (
    _level_stripes,
    _upright_stripes,
    _checkers,
    _dots,
    _rings,
    _spiral,
    _plus,
    _saltire,
    _frame,
    _triangle,
)
