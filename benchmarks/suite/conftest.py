"""pytest-benchmark suites, an op each: the times of one revision against another's on one machine, no dense rival.

make bench-ops                                                               time and keep
make bench-ops OPS="--benchmark-compare --benchmark-compare-fail=median:15%"  and compare with the run kept last
"""

import argparse

import pytest
import torch
from layers import module_arm


@pytest.fixture(scope="module", params=[0.8, 0.95], ids=["80%", "95%"])
def sparsity(request):
    return request.param


@pytest.fixture(scope="module")
def options():
    """What the programs' builders take; every arm is checked against the dense layer when it is built."""
    torch.manual_seed(0)
    return argparse.Namespace(bf16=False, compile=False)


@pytest.fixture(scope="module")
def alone(site):
    """The layer by itself, where a file's ``site`` is an arm's arguments: module, sparsity, x, gradient, multiply-adds
    and options."""
    return module_arm("alone", *site)


@pytest.fixture(scope="module")
def chain(request, site):
    """The layer on tiles, by the ``chain_arm`` that the file imports."""
    return request.module.chain_arm(*site)


def pytest_generate_tests(metafunc):
    if "one_pass" in metafunc.fixturenames:
        metafunc.parametrize("one_pass", ["forward", "dX", "dW", "step"])
