"""A batch and a small network that several test files share."""

import torch

from pysparse_ticket.models import build


def batch(n=8, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=generator), torch.arange(n) % 10


def resnet(depth=20):
    torch.manual_seed(0)
    return build(f"resnet{depth}", 10, (3, 8, 8))
