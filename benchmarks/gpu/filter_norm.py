"""Convolution, batch norm and ReLU of ResNet-50's 3x3 layers, half of the filters and input channels kept: the fused op
against cuDNN and torch's norm in channels_last, also compiled.

    python -m gpu.filter_norm [--tiny --device cpu]

"compact": kept channels alone by cuDNN, norm and ReLU by torch; "fused": our convolution before those; "fused norm":
the convolution gathers the statistics, one pass does the rest. All with batch statistics, as in training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpu.conv_arms import BATCH, LAYERS, TINY, Problem, name_of, problem
from gpu.filter_conv import SPARSITY, half
from gpu.program import BF16 as DTYPE
from gpu.program import Arm, Recorder, attempt, compared, limit_of, options, passes, race, wanted
from pysparse_ticket.nn import FilterSparseConv2d
from pysparse_ticket.nn.fused_norms import fuse_norms

ARMS = ("compact", "fused", "fused norm")
PASSES = ("forward", "step")


def block(conv: nn.Module, channels: int, p: Problem) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(channels, device=p.x.device), nn.ReLU())


def parameters(model: nn.Sequential) -> list[Tensor]:
    return [model[0].weight, model[1].weight, model[1].bias]


def oracle(p: Problem) -> dict[str, Tensor]:
    """In float32; zero in what is removed, as the dense network's norm makes of a channel of zeros. The output's
    gradient is made zero where the norm is near zero, since a rounding decides there whether the ReLU passes it."""
    model, leaf = block(copy.deepcopy(p.conv).float(), len(p.keep_out), p), p.x.float().requires_grad_()
    norm = model[1](model[0](leaf))
    p.grad.mul_(norm.detach().abs() > 0.02)
    dx, dw, *affine = torch.autograd.grad(norm.relu(), [leaf, *parameters(model)], p.grad.float())
    dx, dw = dx * p.keep_in[:, None, None], dw * p.keep_out[:, None, None, None] * p.keep_in[None, :, None, None]
    return {"y": norm.detach().relu(), "dX": dx, "dW": dw} | dict(zip(("d_gamma", "d_beta"), affine, strict=True))


def dense(p: Problem, want: dict[str, Tensor], compiled: bool) -> Arm:
    model = block(copy.deepcopy(p.conv), len(p.keep_out), p)
    function = torch.compile(model, dynamic=False) if compiled else model
    masks = {"dX": p.keep_in[:, None, None], "dW": (want["dW"] != 0)}
    calls = passes(function, p.x, parameters(model), p.grad, PASSES)
    arm = Arm("compiled" if compiled else "cuDNN", calls)
    return compared(arm, want, limit_of(DTYPE), lambda name, t: t * masks.get(name, 1))


def sparse(p: Problem, want: dict[str, Tensor], name: str) -> Arm:
    """Input and output hold the kept channels alone, as between two layers of a block."""
    last = torch.channels_last
    conv = FilterSparseConv2d.from_dense(
        copy.deepcopy(p.conv), p.keep_out, p.keep_in, compact_in=True, compact_out=True
    ).to(memory_format=last)
    conv.set_format("compact" if name == "compact" else "fused")
    model = block(conv, len(conv.out_index), p)
    if name == "fused norm":
        fuse_norms(model)
    x, grad = (t.contiguous(memory_format=last) for t in (p.x[:, p.keep_in], p.grad[:, p.keep_out]))
    kept = {"dX": want["dX"][:, p.keep_in], "dW": want["dW"][p.keep_out][:, p.keep_in]}
    kept |= {"y": want["y"][:, p.keep_out]} | {n: want[n][p.keep_out] for n in ("d_gamma", "d_beta")}
    calls = passes(model, x, parameters(model), grad, PASSES)
    return compared(Arm(name, calls), {n: kept[n] for n in want}, limit_of(DTYPE))


def main(argv: Sequence[str] | None = None) -> Recorder:
    chosen = options(__doc__, argv)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    recorder = Recorder("filter_norm", chosen)
    for channels, side, stride, _ in TINY if chosen.tiny else LAYERS:
        shape = name_of(channels, side, stride)
        if stride > 1 or not wanted(shape, chosen) or recorder.late(shape):
            continue
        p = problem(channels, side, stride, 4 if chosen.tiny else BATCH, half(channels).to(chosen.device))
        want = oracle(p)
        ways = (False, True) if chosen.compile else (False,)
        rivals = [attempt(recorder, shape, "rival", SPARSITY, lambda p=p, w=want, c=c: dense(p, w, c)) for c in ways]
        arms = [attempt(recorder, shape, name, SPARSITY, lambda p=p, w=want, n=name: sparse(p, w, n)) for name in ARMS]
        race(recorder, shape, SPARSITY, [r for r in rivals if r], [a for a in arms if a], PASSES)
    return recorder


if __name__ == "__main__":
    main()
