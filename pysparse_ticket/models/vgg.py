"""VGG-13, -16 and -19 with batch norm for small images (Simonyan and Zisserman 2015; Chen et al. 2021, tables 4, 5)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = {13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class ConvNorm(nn.Module):
    """``relu(norm(conv(x)))``, 3x3: ``[N, in_channels, H, W]`` to ``[N, channels, H, W]``."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Vgg(nn.Module):
    """VGG-``depth`` for small images: ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``, H and W at least 16.

    Five stages of convolutions at ``width`` 64, 128, 256, 512 and 512 channels, with a 2x2 max pooling between two; the
    mean of the last stage's pixels enters ``linear`` fully connected layers, 8 ``width`` features each but the last.
    ``linear`` is 1 as in the lottery-ticket literature, or 2, 3 or 5 as in Chen et al. 2021, table 5, which does not
    give their features. Weights are drawn by ``kaiming_normal_`` at its defaults, biases keep torch's default.
    Raises ValueError for another depth and for ``linear`` below 1.
    """

    def __init__(
        self, depth: int = 16, num_classes: int = 10, in_channels: int = 3, width: int = 64, linear: int = 1
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"a VGG has depth {', '.join(map(str, STAGES))}, not {depth}")
        if linear < 1:
            raise ValueError(f"a VGG ends in 1 or more linear layers, not {linear}")
        self.depth = depth
        for stage, (convs, scale) in enumerate(zip(STAGES[depth], (1, 2, 4, 8, 8), strict=True), 1):
            channels = scale * width
            sizes = [in_channels, *[channels] * (convs - 1)]
            self.add_module(f"stage{stage}", nn.Sequential(*(ConvNorm(size, channels) for size in sizes)))
            in_channels = channels
        self.linear = nn.ModuleList(nn.Linear(in_channels, in_channels) for _ in range(linear - 1))
        self.linear.append(nn.Linear(in_channels, num_classes))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(x)
        for stage in (self.stage2, self.stage3, self.stage4, self.stage5):
            x = stage(F.max_pool2d(x, 2))
        x = x.mean((2, 3))
        for layer in self.linear[:-1]:
            x = F.relu(layer(x))
        return self.linear[-1](x)
