"""The ResNets of CIFAR: three stages of two-convolution blocks at 16, 32 and 64 channels (He et al. 2016, 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (14, 20, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """``relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))``.

    ``[N, in_channels, H, W]`` to ``[N, channels, ceil(H / stride), ceil(W / stride)]``; the shortcut is an identity
    where the shape stays, else a 1x1 convolution and a batch norm.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """An identity where the shape stays, else a 1x1 convolution and a batch norm."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


class CifarResNet(nn.Module):
    """ResNet-``depth`` for small images: ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``, H and W at least 4.

    ``depth`` is 6 D + 2 with D blocks in each of three stages, ``width`` the channels of the first; the papers use
    14, 20, 32, 44, 56 and 110 at width 16. The first block of stages 2 and 3 halves the image and doubles the channels.

    Weights of convolutions and of ``fc`` are drawn by ``kaiming_normal_`` at its defaults (fan in, gain sqrt 2);
    the bias of ``fc`` keeps torch's default; batch norms start at weight 1, bias 0.
    Raises ValueError for a depth that is not 6 D + 2.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            known = ", ".join(map(str, DEPTHS))
            raise ValueError(f"a CIFAR ResNet has depth 6 n + 2 ({known}, ...), not {depth}")
        blocks = (depth - 2) // 6
        self.depth = depth
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.stage1 = _stage(width, width, blocks, stride=1)
        self.stage2 = _stage(width, 2 * width, blocks, stride=2)
        self.stage3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))
