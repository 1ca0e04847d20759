"""MaskedLinear against F.linear: correctness first, then interleaved times of each pass.

    python benchmarks/bench_masked_linear.py [--threads N] [--repeats N] [--sparsity 0.8 0.9]

Ordinary tensors in and out, so packing and unpacking count: dX and dW alone each pack the output's gradient, the step
packs it once. GF are of the surviving weights; the share is of this machine's multiply-add peak in the same run.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from pysparse_ticket.measure import interleave
from pysparse_ticket.ops.library import cpu_isa
from pysparse_ticket.ops.masked_linear import linear_schedule, masked_linear
from pysparse_ticket.ops.pattern import Pattern

SHAPES = ((512, 1024, 1024), (2048, 768, 3072))  # batch, in, out
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
PASSES = ("fwd", "dX", "dW", "all")


def case(batch: int, in_features: int, out_features: int, sparsity: float) -> dict:
    """{arm: call} for dense and ours, checked against each other."""
    torch.manual_seed(0)
    pattern = Pattern.from_mask(torch.rand(out_features, in_features) >= sparsity)
    schedules = linear_schedule(pattern)
    x = torch.randn(batch, in_features, requires_grad=True)
    bias = torch.randn(out_features, requires_grad=True)
    values = torch.randn(pattern.nnz, requires_grad=True)
    weight = pattern.scatter(values).detach().requires_grad_()
    grad = torch.randn(batch, out_features)

    def dense() -> tuple:
        y = F.linear(x, weight, bias)
        return y, *torch.autograd.grad(y, (x, weight, bias), grad)

    def ours() -> tuple:
        y = masked_linear(x, values, bias, pattern, schedules=schedules)
        return y, *torch.autograd.grad(y, (x, values, bias), grad)

    for name, a, b in zip(("y", "dX", "dW", "db"), ours(), dense(), strict=True):
        b = pattern.gather(b) if name == "dW" else b
        error = ((a - b).norm() / b.norm()).item()
        if not error < 1e-5:
            raise SystemExit(f"{name} is wrong by {error:.1e} at {(batch, in_features, out_features, sparsity)}")

    op = torch.ops.pysparse_ticket
    plain = [t.detach() for t in (x, values, bias)]
    packed = op.masked_linear(*plain, *schedules, out_features, False, True)[1]

    def backward(*need: bool):
        return lambda: op.masked_linear_backward(grad, packed, plain[1], None, *schedules, in_features, *need)

    w, d = weight.detach(), plain[0]
    return {
        "dense fwd": lambda: F.linear(d, w, plain[2]),
        "dense dX": lambda: grad @ w,
        "dense dW": lambda: grad.t() @ d,
        "dense all": dense,
        "ours fwd": lambda: op.masked_linear(*plain, *schedules, out_features, False, True),
        "ours dX": backward(True, False, False),
        "ours dW": backward(False, True, False),
        "ours all": ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peak = torch.ops.pysparse_ticket.cpu_peak()
    print(f"{args.threads} threads, {cpu_isa()}, torch {torch.__version__}, peak {peak / 1e9:.0f} GF")
    for batch, in_features, out_features in SHAPES:
        print(f"\nMaskedLinear {in_features}x{out_features}, batch {batch}: speed-up over F.linear, fp32, medians")
        print("sparsity | fwd | dX | dW | all | GF of ours (share of peak) | dense GF (share) | ours ms | dense ms")
        for sparsity in args.sparsity:
            arms = case(batch, in_features, out_features, sparsity)
            times = {name: timing.median for name, timing in interleave(arms, args.repeats).items()}
            ratios = [times[f"dense {p}"] / times[f"ours {p}"] for p in PASSES]
            flops = 6 * batch * in_features * out_features
            dense, ours = flops / times["dense all"], flops * (1 - sparsity) / times["ours all"]
            print(
                f"{sparsity:.0%} | "
                + " | ".join(f"{r:.1f}x" for r in ratios)
                + f" | {ours / 1e9:.0f} ({ours / peak:.0%}) | {dense / 1e9:.0f} ({dense / peak:.0%})"
                + f" | {times['ours all'] * 1e3:.2f} | {times['dense all'] * 1e3:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
