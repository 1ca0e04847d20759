"""masked_linear and tiled_linear: 1024x1024, batch 512."""

import pytest
import torch
from bench_masked_linear import chain_arm  # noqa: F401  (the fixture "chain" takes it)
from torch import nn

from pysparse_ticket.nn import MaskedLinear


@pytest.fixture(scope="module")
def site(sparsity, options):
    layer = nn.Linear(1024, 1024)
    module = MaskedLinear.from_dense(layer, torch.rand(1024, 1024) >= sparsity)
    return module, sparsity, torch.randn(512, 1024), torch.randn(512, 1024), 512 * 1024 * 1024, options


def test_masked_linear(benchmark, alone, one_pass):
    benchmark(alone.calls[one_pass])


def test_tiled_linear(benchmark, chain, one_pass):
    benchmark(chain.calls[one_pass])
