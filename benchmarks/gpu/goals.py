"""Ratios to reach on an H100, by (work, shape, arm, pass, sparsity)."""

from __future__ import annotations

_BLOCKS = {
    ("4096x4096, 8192 tokens", "block 128"): (1.5, 2.8, 6, 7),
    ("4096x4096, 8192 tokens", "block 64"): (1.0, 1.9, 4.3, 6),
    ("4096x4096, 8192 tokens", "block 32"): (1.0, 1.1, 2.6, 4.5),
    ("1024x4096, 32768 tokens", "block 64"): (1.0, 1.7, 2.6, 3.2),
}
GOALS: dict[tuple[str, str, str, str, float], float] = {
    ("block_matmul", shape, arm, "step", sparsity): goal
    for (shape, arm), goals in _BLOCKS.items()
    for sparsity, goal in zip((0.5, 0.75, 0.9, 0.95), goals, strict=True)
}
GOALS |= {("block_matmul", "4096x4096, 8192 tokens", "mask in the kernel, no empty tile", "step", 0.5): 0.95}
GOALS |= {
    ("unstructured", "4096x4096, 8192 tokens, bf16", "packed", "step", sparsity): goal
    for sparsity, goal in ((0.95, 1.0), (0.98, 1.8), (0.99, 3.0))
}
GOALS |= {
    ("unstructured", "4096x4096, 8192 tokens, fp32", "packed", "step", sparsity): goal
    for sparsity, goal in ((0.8, 1.3), (0.9, 2.5), (0.95, 4.5))
}
GOALS |= {
    ("filter_conv", "all 3x3 layers", arm, "step", 0.75): 2.8
    for arm in ("compact", "full shape", "compact, fused", "full shape, fused")
}
GOALS |= {
    ("block_conv", "all 3x3 layers", "block 64", "step", sparsity): goal for sparsity, goal in ((0.9, 1.9), (0.75, 1.2))
}
GOALS |= {
    ("model resnet56", "CIFAR-shaped, batch 128", "layer", "step", 12 / 27): 1.7,
    ("model resnet56", "CIFAR-shaped, batch 128", "layer", "joules a step", 12 / 27): 1 / 0.6,
    ("model resnet50", "ImageNet-shaped, batch 128", "filter", "step", 0.5): 1.6,
}
