"""The ResNets of ImageNet and TinyImageNet: four stages at 64 to 512 channels (He et al. 2016, table 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import BasicBlock, shortcut

BLOCKS = {18: (2, 2, 2, 2), 26: (2, 3, 4, 3), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
STEMS = ("imagenet", "tiny")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with its batch norm, and a shortcut; the 3x3 one has the stride.

    ``[N, in_channels, H, W]`` to ``[N, 4 channels, ceil(H / stride), ceil(W / stride)]``; the shortcut is an identity
    where the shape stays, else a 1x1 convolution and a batch norm.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ImageNetResNet(nn.Module):
    """ResNet-18, -26, -34 (basic blocks) or -50 (bottlenecks): ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    ``stem`` is "imagenet", a 7x7 convolution and a 3x3 max pooling, each of stride 2, for H and W of at least 32, or
    "tiny", a 3x3 convolution that keeps the image's size, for H and W of at least 8. Each of stages 2 to 4 halves the
    image and doubles the channels, of which the first has ``width``. ResNet-26 is that of Chen et al. 2021, table 1,
    with 2, 3, 4 and 3 blocks.

    Weights of convolutions and of ``fc`` are drawn by ``kaiming_normal_`` at its defaults; the bias of ``fc`` keeps
    torch's default. Raises ValueError for another depth or stem.
    """

    def __init__(
        self, depth: int = 18, num_classes: int = 1000, in_channels: int = 3, stem: str = "imagenet", width: int = 64
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"an ImageNet ResNet has depth {', '.join(map(str, BLOCKS))}, not {depth}")
        if stem not in STEMS:
            raise ValueError(f"unknown stem {stem!r}; known: {', '.join(STEMS)}")
        self.depth = depth
        large = stem == "imagenet"
        self.stem = nn.Conv2d(in_channels, width, *((7, 2, 3) if large else (3, 1, 1)), bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        block = Bottleneck if depth >= 50 else BasicBlock
        channels = width
        for stage, blocks in enumerate(BLOCKS[depth]):
            units = []
            for i in range(blocks):
                units.append(block(channels, width << stage, stride=2 if stage and not i else 1))
                channels = (width << stage) * getattr(block, "expansion", 1)
            self.add_module(f"stage{stage + 1}", nn.Sequential(*units))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem_norm(self.stem(x))))
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.fc(x.mean((2, 3)))
