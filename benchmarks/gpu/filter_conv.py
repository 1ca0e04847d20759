"""ResNet-50's 3x3 layers with half of their filters and input channels: ours against cuDNN in channels_last.

    python -m gpu.filter_conv [--tiny --device cpu]

"compact": removed channels are in neither input nor output, as between two layers of a block. "full shape": both have
all channels, exact zeros in the removed ones. The sums weigh each layer by how often ResNet-50 has it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gpu.conv_arms import Problem, race_layers
from gpu.program import BF16, Arm, Recorder, compared, limit_of, options, passes
from pysparse_ticket.nn import FilterSparseConv2d

SPARSITY = 0.75  # of the weights: half of the filters times half of the inputs


def half(channels: int) -> Tensor:
    """The mask of a layer with half of its filters and input channels."""
    keep_out, keep_in = (torch.rand(channels).argsort() >= channels // 2 for _ in range(2))
    return (keep_out[:, None] & keep_in)[:, :, None, None].expand(-1, -1, 3, 3)


def sparse(p: Problem, compact: bool, fmt: str | None, name: str) -> Arm:
    """Our module, by physical compaction into cuDNN or in another format that it may have."""
    last, keep_out, keep_in = torch.channels_last, p.keep_out, p.keep_in
    module = FilterSparseConv2d.from_dense(
        copy.deepcopy(p.conv), keep_out, keep_in, compact_in=compact, compact_out=compact
    ).to(memory_format=last)
    if fmt:
        module.set_format(fmt)
    x, grad, want = p.x, p.grad, dict(p.want)
    if compact:
        x, grad = (t.contiguous(memory_format=last) for t in (x[:, keep_in], grad[:, keep_out]))
        want |= {"y": want["y"][:, keep_out], "dX": want["dX"][:, keep_in]}
    calls = passes(module, x, [module.weight], grad)

    def plain(what: str, tensor: Tensor) -> Tensor:
        if what == "dW" and tensor.shape != p.conv.weight.shape:
            return module.expand_like("weight", tensor)
        return tensor * keep_in[:, None, None] if what == "dX" and not compact else tensor

    return compared(Arm(name, calls), want, limit_of(BF16), plain)


def main(argv: Sequence[str] | None = None) -> Recorder:
    chosen = options(__doc__, argv)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    recorder = Recorder("filter_conv", chosen)
    formats = (None, *(f for f in getattr(FilterSparseConv2d, "FORMATS", ()) if f not in ("compact", "dense")))
    names = {
        (compact, fmt): ("compact" if compact else "full shape") + (f", {fmt}" if fmt else "")
        for fmt in formats
        for compact in (True, False)
    }
    arms = {name: partial(sparse, compact=compact, fmt=fmt, name=name) for (compact, fmt), name in names.items()}
    race_layers(recorder, SPARSITY, half, arms)
    return recorder


if __name__ == "__main__":
    main()
