"""ResNet-50's 3x3 layers with masks of 64 x 64 blocks at single taps: ours in tiles against cuDNN in channels_last.

python -m gpu.block_conv [--tiny --device cpu]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gpu.conv_arms import Problem, race_layers
from gpu.program import BF16, Arm, Recorder, compared, limit_of, options, passes
from gpu.tickets import block_mask
from pysparse_ticket.nn import MaskedConv2d

SPARSITIES = (0.9, 0.75)
ARM = "block 64"


def blocks(p: Problem) -> Arm:
    module = MaskedConv2d.from_dense(copy.deepcopy(p.conv), p.mask)
    module.set_format("blocks")

    def plain(what: str, tensor: Tensor) -> Tensor:
        return module.dense_like(tensor) if what == "dW" else tensor

    calls = passes(module, p.x, [module.values], p.grad)
    return compared(Arm(ARM, calls), p.want, limit_of(BF16), plain)


def main(argv: Sequence[str] | None = None) -> Recorder:
    chosen = options(__doc__, argv)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    recorder = Recorder("block_conv", chosen)
    for sparsity in SPARSITIES:
        race_layers(recorder, sparsity, lambda c, s=sparsity: block_mask((c, c, 3, 3), 64, s), {ARM: blocks})
    return recorder


if __name__ == "__main__":
    main()
