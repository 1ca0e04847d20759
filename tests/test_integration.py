"""Sparsified models under torch's own machinery: compile, autocast, DDP, replicas, checkpoints."""

import copy
import subprocess
import sys
from pathlib import Path

import ddp_worker
import pytest
import torch
import torch.nn.functional as F

import pysparse_ticket as pst
from pysparse_ticket.models import build

PLANS = ["packed", "dense", "tiled", "blocks"]


def sparse_resnet(plan, device="cpu"):
    torch.manual_seed(0)
    model = build("resnet14", 10, (3, 8, 8)).to(device)
    ticket = pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.8)
    return pst.sparsify(model, ticket, plan=plan)


@pytest.mark.parametrize("plan", PLANS)
def test_compiles_without_a_graph_break(plan, device):
    model = sparse_resnet(plan, device)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x, y = torch.randn(5, 3, 8, 8, device=device), torch.arange(5, device=device)
    expected, actual = model(x), compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    F.cross_entropy(expected, y).backward()
    F.cross_entropy(actual, y).backward()
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_stays_near_float32(plan, device):
    model = sparse_resnet(plan, device).eval()
    x = torch.randn(5, 3, 8, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = model(x)
    expected = model(x)
    # 14 layers, each rounding to 8 bits: sqrt(14) * 2^-8 is 1.5%
    assert ((y.float() - expected).norm() / expected.norm()) < 0.05
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("plan", PLANS)
def test_two_ddp_processes_train_as_one_on_the_joint_batch(plan, tmp_path):
    words = [sys.executable, str(Path(ddp_worker.__file__))]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store"), plan, str(tmp_path / "out.pt")])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    model = ddp_worker.network(plan)
    start = copy.deepcopy(model.state_dict())
    ddp_worker.train(model, slice(None))
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(tensor, start[name])


@pytest.mark.parametrize("plan", PLANS)
def test_replicas_compute_what_the_model_does(plan, device):
    """As nn.DataParallel makes them: shallow copies whose parameters are plain tensors."""
    model = sparse_resnet(plan, device).eval()
    modules = dict(model.named_modules())
    copies = {name: module._replicate_for_data_parallel() for name, module in modules.items()}
    for name, module in modules.items():
        for key, child in module._modules.items():
            if child is not None:
                copies[name]._modules[key] = copies[f"{name}.{key}".removeprefix(".")]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                setattr(copies[name], key, parameter.detach().clone().requires_grad_())
    x = torch.randn(3, 3, 8, 8, device=device)
    assert torch.equal(copies[""](x), model(x))


@pytest.mark.parametrize("plan", PLANS)
def test_checkpoint_loads_with_weights_only_into_either_model(plan, tmp_path, device):
    sparse = sparse_resnet(plan, device).eval()
    torch.save(sparse.state_dict(), tmp_path / "w.pt")
    dense = build("resnet14", 10, (3, 8, 8)).to(device).eval()
    dense.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    other = sparse_resnet("packed", device).eval()
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    x = torch.randn(3, 3, 8, 8, device=device)
    expected = sparse(x)
    for model in (dense, other):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
