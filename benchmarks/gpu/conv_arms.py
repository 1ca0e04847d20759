"""ResNet-50's 3x3 layers with masked weights: what they give in wider sums, cuDNN on them, and sums over all layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gpu.program import BF16, Arm, Recorder, attempt, compared, limit_of, passes, race, wanted
from gpu.record import Row

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
ALL = "all 3x3 layers"


@dataclass
class Problem:
    """A layer in channels_last whose weight is zero under the mask ``[O, C, 3, 3]``."""

    conv: nn.Conv2d
    mask: Tensor
    x: Tensor
    grad: Tensor
    want: dict[str, Tensor]

    @property
    def keep_out(self) -> Tensor:
        return self.mask.flatten(1).any(1)

    @property
    def keep_in(self) -> Tensor:
        return self.mask.transpose(0, 1).flatten(1).any(1)


Arms = Mapping[str, Callable[[Problem], Arm]]


def problem(channels: int, side: int, stride: int, batch: int, mask: Tensor) -> Problem:
    last, device = torch.channels_last, mask.device
    conv = nn.Conv2d(channels, channels, 3, stride, 1, bias=False, device=device)
    with torch.no_grad():
        conv.weight.mul_(mask)
    conv = conv.to(BF16, memory_format=last)
    x = torch.randn(batch, channels, side, side, device=device).to(BF16, memory_format=last)
    wide, leaf = copy.deepcopy(conv).float(), x.float().requires_grad_()
    y = wide(leaf)
    grad = torch.randn_like(y).to(BF16)
    dx, dw = torch.autograd.grad(y, [leaf, wide.weight], grad.float())
    return Problem(conv, mask, x, grad, {"y": y.detach(), "dX": dx, "dW": dw * mask})


def dense(p: Problem, compiled: bool) -> Arm:
    """cuDNN over all channels, some of which are zero; the gradients of the removed weights are not compared."""
    conv = copy.deepcopy(p.conv)
    function, names = (torch.compile(conv, dynamic=False), ("forward", "step")) if compiled else (conv, None)
    calls = passes(function, p.x, [conv.weight], p.grad, *([names] if names else []))
    arm = Arm("compiled" if compiled else "cuDNN", calls)
    return compared(arm, p.want, limit_of(BF16), lambda name, t: t * p.mask if name == "dW" else t)


def race_layers(recorder: Recorder, sparsity: float, mask_of: Callable[[int], Tensor], arms: Arms) -> None:
    """Each layer under ``mask_of(its channels)``, then their sum."""
    chosen = recorder.options
    layers = TINY if chosen.tiny else LAYERS
    for channels, side, stride, _ in layers:
        shape = name_of(channels, side, stride)
        if not wanted(shape, chosen) or recorder.late(f"{shape} at {sparsity:.0%}"):
            continue
        p = problem(channels, side, stride, 4 if chosen.tiny else BATCH, mask_of(channels).to(chosen.device))
        rivals = {"cuDNN": partial(dense, compiled=False)}
        # inductor hands a lone convolution to cuDNN too: one layer shows that compiling it gains nothing
        if chosen.compile and (channels, side, stride) == layers[0][:3]:
            rivals["compiled"] = partial(dense, compiled=True)
        made = {
            name: attempt(recorder, shape, name, sparsity, partial(make, p))
            for name, make in {**rivals, **arms}.items()
        }
        found = [[made[name] for name in group if made[name]] for group in (rivals, arms)]
        race(recorder, shape, sparsity, *found)
    if not chosen.only:
        totals(recorder, sparsity, {name_of(*layer): count for *layer, count in layers})


def name_of(channels: int, side: int, stride: int) -> str:
    return f"{channels} channels, {side}x{side}, stride {stride}"


def totals(recorder: Recorder, sparsity: float, counts: Mapping[str, int]) -> None:
    """The time of all layers, each as often as the network has it; nothing where one was not measured."""
    rows = [row for row in recorder.rows if row.what == "step" and row.ours and row.best and row.sparsity == sparsity]
    for arm in dict.fromkeys(row.arm for row in rows):
        own = {row.shape: row for row in rows if row.arm == arm}
        if set(own) != set(counts):
            continue
        ours, best = (sum(getattr(own[s], field) * n for s, n in counts.items()) for field in ("ours", "best"))
        hows = {row.how for row in own.values()}
        how = hows.pop() if len(hows) == 1 else "mixed"
        recorder.add(Row("", ALL, arm, sparsity, "step", "ms", ours, best, "cuDNN", how=how))
