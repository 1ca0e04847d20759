"""masked_conv2d and tiled_conv2d: 3x3, 64 channels, 8x8, batch 128; tiled_norm_conv2d between two norms there."""

import pytest
import torch
from bench_masked_conv2d import chain_arm  # noqa: F401  (the fixture "chain" takes it)
from layers import conv_site
from torch import nn

from pysparse_ticket.nn import MaskedConv2d
from pysparse_ticket.ops.tiled_conv2d import tile_pack
from pysparse_ticket.ops.tiled_norm_conv2d import tiled_norm, tiled_norm_conv2d

BATCH, CHANNELS, SIDE = 128, 64, 8


@pytest.fixture(scope="module")
def site(sparsity, options):
    layer, x, grad, macs = conv_site(BATCH, CHANNELS, SIDE)
    module = MaskedConv2d.from_dense(layer, torch.rand(layer.weight.shape) >= sparsity)
    return module, sparsity, x, grad, macs, options


def test_masked_conv2d(benchmark, alone, one_pass):
    benchmark(alone.calls[one_pass])


def test_tiled_conv2d(benchmark, chain, one_pass):
    benchmark(chain.calls[one_pass])


def test_tiled_norm_conv2d(benchmark, site):
    """Two convolutions with their norms and ReLUs, forward and backward: the second normalises as it loads."""
    module, _, x, grad, *_ = site
    values, pattern = module.packed_values().detach().clone().requires_grad_(), module.pattern
    norms = [nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)]
    geometry = (BATCH, 1, values, pattern, (1, 1), (1, 1), (1, 1))
    tiles, grad_tiles = tile_pack(x, 1).requires_grad_(), tile_pack(grad, 1)
    wanted = [tiles, values, *norms[0].parameters(), *norms[1].parameters()]

    def step():
        raw = tiles
        for norm in norms:
            raw, _ = tiled_norm_conv2d(raw, *geometry, norm=norm, relu=True)
        return torch.autograd.grad(tiled_norm(raw, BATCH, 1), wanted, grad_tiles)

    assert all(torch.isfinite(gradient).all() for gradient in benchmark(step))
