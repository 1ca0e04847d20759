"""ResNet-50's 3x3 layers with half of their filters and input channels: ours against cuDNN in channels_last.

    python -m gpu.filter_conv [--tiny --device cpu]

"compact": removed channels are in neither input nor output, as between two layers of a block. "full shape": both have
all channels, exact zeros in the removed ones. The sums weigh each layer by how often ResNet-50 has it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpu.program import BF16, Arm, Recorder, attempt, compared, limit_of, options, passes, race, wanted
from gpu.record import Row
from pysparse_ticket.nn import FilterSparseConv2d

BATCH = 128
# channels, side of the input, stride, layers of this kind in ResNet-50
LAYERS = (
    (64, 56, 1, 3),
    (128, 28, 1, 3),
    (256, 14, 1, 5),
    (512, 7, 1, 2),
    (128, 56, 2, 1),
    (256, 28, 2, 1),
    (512, 14, 2, 1),
)
TINY = ((16, 8, 1, 2), (16, 8, 2, 1))
SPARSITY = 0.75  # of the weights: half of the filters times half of the inputs
ALL = "all 3x3 layers"


@dataclass
class Problem:
    conv: nn.Conv2d
    keep_out: Tensor
    keep_in: Tensor
    x: Tensor
    grad: Tensor
    want: dict[str, Tensor]


def problem(channels: int, side: int, stride: int, batch: int, device: torch.device) -> Problem:
    last = torch.channels_last
    conv = nn.Conv2d(channels, channels, 3, stride, 1, bias=False, device=device)
    keep_out, keep_in = (torch.rand(channels, device=device).argsort() >= channels // 2 for _ in range(2))
    mask = keep_out[:, None, None, None] & keep_in[None, :, None, None]
    with torch.no_grad():
        conv.weight.mul_(mask)
    conv = conv.to(BF16, memory_format=last)
    x = torch.randn(batch, channels, side, side, device=device).to(BF16, memory_format=last)
    wide, leaf = copy.deepcopy(conv).float(), x.float().requires_grad_()
    y = wide(leaf)
    grad = torch.randn_like(y).to(BF16)
    dx, dw = torch.autograd.grad(y, [leaf, wide.weight], grad.float())
    want = {"y": y.detach(), "dX": dx * keep_in[:, None, None], "dW": dw * mask}
    return Problem(conv, keep_out, keep_in, x, grad, want)


def dense(p: Problem, compiled: bool) -> Arm:
    """cuDNN over all channels, some of which are zero; the gradients of the removed ones are not compared."""
    conv = copy.deepcopy(p.conv)
    function, names = (torch.compile(conv, dynamic=False), ("forward", "step")) if compiled else (conv, None)
    calls = passes(function, p.x, [conv.weight], p.grad, *([names] if names else []))
    mask = p.keep_out[:, None, None, None] & p.keep_in[None, :, None, None]
    masks = {"dX": p.keep_in[:, None, None], "dW": mask}
    arm = Arm("compiled" if compiled else "cuDNN", calls)
    return compared(arm, p.want, limit_of(BF16), lambda name, t: t * masks.get(name, 1))


def sparse(p: Problem, compact: bool, fmt: str | None) -> Arm:
    """Our module, by physical compaction into cuDNN or in another format that it may have."""
    last = torch.channels_last
    module = FilterSparseConv2d.from_dense(
        copy.deepcopy(p.conv), p.keep_out, p.keep_in, compact_in=compact, compact_out=compact
    ).to(memory_format=last)
    if fmt:
        module.set_format(fmt)
    x, grad, want = p.x, p.grad, dict(p.want)
    if compact:
        x, grad = (t.contiguous(memory_format=last) for t in (x[:, p.keep_in], grad[:, p.keep_out]))
        want |= {"y": want["y"][:, p.keep_out], "dX": want["dX"][:, p.keep_in]}
    name = ("compact" if compact else "full shape") + (f", {fmt}" if fmt else "")
    calls = passes(module, x, [module.weight], grad)

    def plain(what: str, tensor: Tensor) -> Tensor:
        if what == "dW" and tensor.shape != p.conv.weight.shape:
            return module.expand_like("weight", tensor)
        return tensor * p.keep_in[:, None, None] if what == "dX" and not compact else tensor

    return compared(Arm(name, calls), want, limit_of(BF16), plain)


def main(argv: Sequence[str] | None = None) -> Recorder:
    chosen = options(__doc__, argv)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    recorder = Recorder("filter_conv", chosen)
    formats = (None, *(f for f in getattr(FilterSparseConv2d, "FORMATS", ()) if f not in ("compact", "dense")))
    layers = TINY if chosen.tiny else LAYERS
    for channels, side, stride, count in layers:
        shape = f"{channels} channels, {side}x{side}, stride {stride}"
        if not wanted(shape, chosen) or recorder.late(shape):
            continue
        p = problem(channels, side, stride, 4 if chosen.tiny else BATCH, chosen.device)
        # inductor hands a lone convolution to cuDNN too: one layer shows that compiling it gains nothing
        compiled = chosen.compile and (channels, side, stride, count) == layers[0]
        rivals = [attempt(recorder, shape, "cuDNN", SPARSITY, lambda p=p: dense(p, False))]
        if compiled:
            rivals.append(attempt(recorder, shape, "compiled", SPARSITY, lambda p=p: dense(p, True)))
        arms = [
            attempt(recorder, shape, f"{kind}", SPARSITY, lambda p=p, c=c, f=f: sparse(p, c, f))
            for f in formats
            for c, kind in ((True, "compact"), (False, "full shape"))
        ]
        race(recorder, shape, SPARSITY, [r for r in rivals if r], [a for a in arms if a])
    if not chosen.only:
        totals(recorder, {f"{c} channels, {s}x{s}, stride {t}": count for c, s, t, count in layers})
    return recorder


def totals(recorder: Recorder, counts: dict[str, int]) -> None:
    """The time of all layers, each as often as the network has it; nothing where one was not measured."""
    rows = [row for row in recorder.rows if row.what == "step" and row.ours and row.best]
    for arm in dict.fromkeys(row.arm for row in rows):
        own = {row.shape: row for row in rows if row.arm == arm}
        if set(own) != set(counts):
            continue
        ours, best = (sum(getattr(own[s], field) * n for s, n in counts.items()) for field in ("ours", "best"))
        hows = {row.how for row in own.values()}
        how = hows.pop() if len(hows) == 1 else "mixed"
        recorder.add(Row("", ALL, arm, SPARSITY, "step", "ms", ours, best, "cuDNN", how=how))


if __name__ == "__main__":
    main()
