"""FilterSparseConv2d: 3x3, half of 64 channels in and out, 8x8, batch 128."""

import pytest
from bench_filter_sparse_conv2d import module_arm
from layers import conv_site
from networks import keep

from pysparse_ticket.nn import FilterSparseConv2d

BATCH, CHANNELS, SIDE = 128, 64, 8


@pytest.fixture(scope="module", params=[True, False], ids=["compact", "full"])
def arm(request, options):
    layer, x, grad, macs = conv_site(BATCH, CHANNELS, SIDE)
    kept = keep(CHANNELS, 0.5), keep(CHANNELS, 0.5)
    module = FilterSparseConv2d.from_dense(layer, *kept, compact_in=request.param, compact_out=request.param)
    return module_arm("half", module, 0.5, x, grad, macs, options)


def test_filter_sparse_conv2d(benchmark, arm, one_pass):
    benchmark(arm.calls[one_pass])
