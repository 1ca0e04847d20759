"""FilterSparseConv2d: 3x3, half of 64 channels in and out, 8x8, batch 128."""

import pytest
import torch
from bench_filter_sparse_conv2d import module_arm
from networks import keep
from torch import nn

from pysparse_ticket.nn import FilterSparseConv2d

BATCH, CHANNELS, SIDE = 128, 64, 8


@pytest.fixture(scope="module", params=[True, False], ids=["compact", "full"])
def arm(request, options):
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
    kept = keep(CHANNELS, 0.5), keep(CHANNELS, 0.5)
    module = FilterSparseConv2d.from_dense(layer, *kept, compact_in=request.param, compact_out=request.param)
    x, grad = (torch.randn(BATCH, CHANNELS, SIDE, SIDE) for _ in range(2))
    return module_arm("half", module, 0.5, x, grad, grad.numel() * CHANNELS * 9, options)


def test_filter_sparse_conv2d(benchmark, arm, one_pass):
    benchmark(arm.calls[one_pass])
