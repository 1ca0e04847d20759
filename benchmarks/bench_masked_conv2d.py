"""MaskedConv2d against F.conv2d: correctness first, then interleaved times of each pass.

    python benchmarks/bench_masked_conv2d.py [--threads N] [--repeats N] [--sparsity 0.8 0.9] [--shape 64x8 ...]

"alone" takes and returns ordinary tensors, so packing and unpacking count. "chain" is the layer between two of ours:
batch tiles in and out, no batch norm. Dense is the faster of contiguous and channels_last, chosen per pass. GF are of
the surviving weights; the share is of this machine's multiply-add peak in the same run.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from pysparse_ticket.measure import interleave
from pysparse_ticket.ops.library import cpu_isa
from pysparse_ticket.ops.masked_conv2d import masked_conv2d
from pysparse_ticket.ops.pattern import Pattern
from pysparse_ticket.ops.tiled_conv2d import tile_pack, tile_unpack, tiled_conv2d

# batch, channels in and out, image side, kernel side, stride
SHAPES = {
    "64x8": (128, 64, 64, 8, 3, 1),
    "32x16": (128, 32, 32, 16, 3, 1),
    "16x32": (128, 16, 16, 32, 3, 1),
    "16-32x32 stride 2": (128, 16, 32, 32, 3, 2),
    "32-64x16 stride 2": (128, 32, 64, 16, 3, 2),
    "16-32x32 1x1 stride 2": (128, 16, 32, 32, 1, 2),
    "128x28": (32, 128, 128, 28, 3, 1),
}
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
PASSES = {"fwd": (), "dX": (True, False), "dW": (False, True), "all": (True, True)}


def case(shape: tuple[int, ...], sparsity: float) -> dict:
    """{"arm pass": call} for contiguous, channels_last, alone and chain, checked against each other."""
    n, channels, outputs, side, kernel, stride = shape
    padding = kernel // 2
    torch.manual_seed(0)
    pattern = Pattern.from_mask(torch.rand(outputs, channels, kernel, kernel) >= sparsity)
    values = torch.randn(pattern.nnz)
    geometry = ((stride, stride), (padding, padding), (1, 1))
    x = torch.randn(n, channels, side, side)
    grad = torch.randn_like(F.conv2d(x, pattern.scatter(values), None, *geometry))
    tiles, grad_tiles = tile_pack(x), tile_pack(grad)
    weight = pattern.scatter(values)
    last = {"memory_format": torch.channels_last}

    def dense(x, w):
        return F.conv2d(x, w, None, *geometry)

    def alone(x, v):
        return masked_conv2d(x, v, None, pattern, *geometry)

    def chain(t, v):
        return tiled_conv2d(t, n, 1, v, pattern, *geometry)[0]

    arms = {
        "contiguous": (dense, x, weight, grad),
        "channels_last": (dense, x.to(**last), weight.to(**last), grad.to(**last)),
        "alone": (alone, x, values, grad),
        "chain": (chain, tiles, values, grad_tiles),
    }

    def run(arm: str, need: tuple):
        f, data, parameter, g = arms[arm]
        if not need:
            with torch.no_grad():
                return f(data, parameter)
        leaves = [t.detach().requires_grad_(bool(want)) for t, want in zip((data, parameter), need, strict=True)]
        return torch.autograd.grad(f(*leaves), [t for t in leaves if t.requires_grad], g)

    want = (run("contiguous", ()), *run("contiguous", (True, True)))
    for arm in ("alone", "chain"):
        got = [run(arm, ()), *run(arm, (True, True))]
        if arm == "chain":
            got[:2] = tile_unpack(got[0], n), tile_unpack(got[1], n)
        for name, a, b in zip(("y", "dX", "dW"), got, want, strict=True):
            b = pattern.gather(b) if name == "dW" else b
            error = ((a - b).norm() / b.norm()).item()
            if not error < 1e-5:
                raise SystemExit(f"{arm} {name} is wrong by {error:.1e} at {shape}, {sparsity}")
    return {f"{arm} {p}": (lambda arm=arm, need=need: run(arm, need)) for arm in arms for p, need in PASSES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peak = torch.ops.pysparse_ticket.cpu_peak()
    print(f"{args.threads} threads, {cpu_isa()}, torch {torch.__version__}, peak {peak / 1e9:.0f} GF")
    for name in args.shape:
        n, channels, outputs, side, kernel, stride = SHAPES[name]
        print(f"\nMaskedConv2d {name}, batch {n}: speed-up over F.conv2d, fp32, medians; dX and dW with their forward")
        columns = [f"{arm} {p}" for arm in ("alone", "chain") for p in PASSES]
        print(" | ".join(("sparsity", *columns, "chain GF", "dense GF")))
        flops = 6 * n * outputs * channels * kernel**2 * (-(-side // stride)) ** 2
        for sparsity in args.sparsity:
            times = {k: t.median for k, t in interleave(case(SHAPES[name], sparsity), args.repeats).items()}
            dense = {p: min(times[f"contiguous {p}"], times[f"channels_last {p}"]) for p in PASSES}
            ratios = [dense[p] / times[f"{arm} {p}"] for arm in ("alone", "chain") for p in PASSES]
            ours, best = flops * (1 - sparsity) / times["chain all"], flops / dense["all"]
            print(
                f"{sparsity:.0%} | "
                + " | ".join(f"{r:.1f}x" for r in ratios)
                + f" | {ours / 1e9:.0f} ({ours / peak:.0%}) | {best / 1e9:.0f} ({best / peak:.0%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
