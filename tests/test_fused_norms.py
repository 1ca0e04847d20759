"""Models whose fused filter convolutions run with the norm, add and ReLU behind them: by the interpreter on a machine
without a GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_filter_conv2d import DEVICE, relative
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.measure import macs
from pysparse_ticket.nn import choose, convert
from pysparse_ticket.nn.fused_norms import FusedNorms, fuse_norms
from pysparse_ticket.ops.library import backend_of, use_backend
from pysparse_ticket.ticket import Ticket, fingerprint

pytestmark = pytest.mark.usefixtures("gpu_or_interpreter")
KEPT = torch.tensor([True, False, True, True, False, True, False, True])


def conv(c, o, stride=1):
    return nn.Conv2d(c, o, 3, stride, 1, bias=False)


class Block(nn.Module):
    """Some channels within, all around; ``read_twice``: the second norm is not alone in reading its convolution."""

    def __init__(self, read_twice=False):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(6, 8), nn.BatchNorm2d(8), conv(8, 6), nn.BatchNorm2d(6)
        self.relu, self.read_twice = nn.ReLU(inplace=True), read_twice

    def forward(self, x):
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        z = self.relu(self.bn2(y) + x)
        return z * y if self.read_twice else z


def model_and_ticket(block=Block, **options):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), block(**options), nn.Flatten(), nn.Linear(150, 4))
    return model.to(DEVICE), Ticket(filters={"3.conv1": KEPT}, architecture=fingerprint(model))


def images(n=4):
    return torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def trained(model, steps=3):
    """Losses and the state after some steps."""
    x, losses = images(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(4, device=DEVICE))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_trains_as_the_modules_one_by_one(training):
    model, ticket = model_and_ticket()
    kind, keys = type(model), list(model.state_dict())
    modules = pst.sparsify(copy.deepcopy(model), ticket).train(training)
    fused = pst.sparsify(model, ticket, plan="fused norm").train(training)
    assert isinstance(fused, FusedNorms) and isinstance(fused, kind) and list(fused.state_dict()) == keys
    assert [(row.layer, row.format) for row in pst.plan(fused).layers] == [
        ("3.conv1", "fused norm"),
        ("3.conv2", "fused norm"),
    ]
    with use_backend("triton"):
        losses, state = trained(fused)
    assert backend_of("filter_conv2d_norm") == "triton"
    expected, after = trained(modules)
    assert losses == pytest.approx(expected, rel=1e-4) and losses[0] != losses[-1]
    for name, tensor in after.items():
        assert relative(state[name], tensor) < 1e-4, name
    with use_backend("triton"):
        again, x = copy.deepcopy(fused).eval(), images()
        assert relative(again(x), modules.eval()(x)) < 1e-4
        with again.modules_one_by_one():
            assert relative(again(x), modules(x)) < 1e-4
    assert macs(fused, x) == macs(modules, x)
    dense = pst.densify(fused)
    assert type(dense) is kind and relative(dense.eval()(x), modules(x)) < 1e-4


def test_compiles_without_a_break():
    model, ticket = model_and_ticket()
    fused = pst.sparsify(model, ticket, plan="fused norm")
    twin, x = copy.deepcopy(fused), images()
    with use_backend("triton"):
        y = torch.compile(fused, fullgraph=True, backend="aot_eager")(x)
        y.square().sum().backward()
        want = twin(x)
        want.square().sum().backward()
    assert relative(y, want) < 1e-5
    for (name, mine), theirs in zip(fused.named_parameters(), twin.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-4, name
    assert torch.equal(model[1].num_batches_tracked, twin[1].num_batches_tracked)


def test_a_convolution_that_others_read_keeps_its_norm_to_itself():
    model, ticket = model_and_ticket(read_twice=True)
    fused = pst.sparsify(model, ticket, plan="fused norm")
    assert [row.format for row in pst.plan(fused).layers] == ["fused norm", "fused"]
    modules, x = copy.deepcopy(fused), images()
    with use_backend("triton"), modules.modules_one_by_one():
        assert relative(fused(x), modules(x)) < 1e-5


def test_a_norm_over_all_processes_and_another_format_run_one_by_one():
    model, ticket = model_and_ticket()
    fused = pst.sparsify(model, ticket, plan="fused norm").eval()
    x, seen = images(), []
    expected = fused(x)
    before = fused[3].bn2
    fused[3].bn2 = nn.SyncBatchNorm(6).to(DEVICE).eval()
    fused[3].bn2.load_state_dict(before.state_dict())
    fused[3].bn2.register_forward_hook(lambda *_: seen.append("bn2"))
    fused[3].conv1.set_format("compact")
    fused[3].bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    with use_backend("triton"):  # the reference would call the norms too
        assert relative(fused(x), expected) < 1e-5 and seen == ["bn1", "bn2"]
    other = pst.densify(copy.deepcopy(fused))
    other[3].bn1 = nn.SyncBatchNorm(8)
    with pytest.raises(ValueError, match="Sequential has no batch norm behind a fused convolution"):
        fuse_norms(other)


class Asks(Block):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x).abs()


def raced(monkeypatch, times, block=Block, raises=None):
    """What a GPU's races make of the model, run on whatever device is here, and the arms of each race."""
    seen = []

    def every_one_fused(model, x, sites, forced, *rest):
        asked = {name: fmt for name, fmt in forced.items() if fmt != "auto"}
        choose.choose_filters(model, None, sites, dict.fromkeys(sites, "fused") | asked, *rest)

    def race_steps(arms, x):
        seen.append(set(arms) - {"tiled"})
        if raises and "fused norm" in arms:
            raise ValueError(raises)
        return {name: times[name] for name in arms}

    monkeypatch.setattr(convert, "choose_filters", every_one_fused)
    monkeypatch.setattr(choose, "race_steps", race_steps)
    monkeypatch.setattr(choose.PlanCache, "get_or_race", lambda self, key, make: make())
    with use_backend("reference"):
        return pst.sparsify(*model_and_ticket(block), sample=images()), seen


def test_the_race_of_whole_steps_decides(monkeypatch):
    times = {"dense": 3.0, "layers": 2.0, "tiled": 9.0, "fused norm": 1.5}
    model, arms = raced(monkeypatch, times)
    assert arms == [{"dense", "layers", "fused norm"}]
    assert isinstance(model, FusedNorms) and pst.plan(model).step_ratio == 0.5
    rows = pst.plan(model).layers
    assert {(r.format, r.why) for r in rows} == {
        ("fused norm", "norm fused, the whole step takes 0.50 of the dense one's")
    }
    again, ticket = model_and_ticket()
    again = pst.sparsify(again, ticket, plan={row.layer: row.format for row in rows})
    assert isinstance(again, FusedNorms) and relative(again(images()), model(images())) < 1e-6
    model, _ = raced(monkeypatch, times | {"fused norm": 2.1})
    assert not isinstance(model, FusedNorms) and {r.format for r in pst.plan(model).layers} == {"fused"}
    model, _ = raced(monkeypatch, times | {"layers": 4.0, "fused norm": 3.5})
    assert not isinstance(model, FusedNorms) and {r.format for r in pst.plan(model).layers} == {"dense"}


def test_what_cannot_be_fused_says_why_and_stays(monkeypatch):
    times = {"dense": 3.0, "layers": 2.0, "tiled": 9.0}
    model, arms = raced(monkeypatch, times, Asks)
    assert arms == [{"dense", "layers"}] and {r.format for r in pst.plan(model).layers} == {"fused"}
    assert "no fused norms: Sequential asks for self.training in a forward" in str(pst.plan(model))
    model, arms = raced(monkeypatch, times, raises="the residual has another shape")
    assert "fused norm" in arms[0] and arms[1] == {"dense", "layers"}
    assert "no fused norms: the residual has another shape" in str(pst.plan(model))
    assert {r.format for r in pst.plan(model).layers} == {"fused"}
