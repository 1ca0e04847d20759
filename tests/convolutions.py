"""Geometries that every GPU convolution is tested at, and how far off its results may be."""

import torch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # a few roundings of the dtype

# kernel, stride, padding, dilation, images: odd sizes, strides that skip pixels, taps that no pixel of a phase meets
GEOMETRIES = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), (2, 7, 9)),
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1), (3, 5, 5)),
    "3x3 stride 2": ((3, 3), (2, 2), (1, 1), (1, 1), (2, 8, 7)),
    "1x1 stride 2": ((1, 1), (2, 2), (0, 0), (1, 1), (2, 5, 6)),
    "2x5 stride 3x1": ((2, 5), (3, 1), (0, 2), (1, 1), (1, 7, 6)),
    "3x3 dilation 2": ((3, 3), (1, 1), (2, 2), (2, 2), (1, 7, 8)),
    "3x3 stride 2 dilation 2": ((3, 3), (2, 2), (1, 2), (2, 2), (1, 9, 8)),
    "smaller than the stride": ((1, 1), (4, 4), (0, 0), (1, 1), (2, 2, 1)),
}


def relative(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
