"""SynFlow against its conservation law, a net worked out by hand, and the failures of other implementations."""

import copy

import pytest
import torch
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.scores import prunable, synflow


def two_layers(bias=False):
    """[[1, -2], [3, 4]] then [[-5, 6]]."""
    net = nn.Sequential(nn.Linear(2, 2, bias=bias), nn.ReLU(), nn.Linear(2, 1, bias=bias))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        net[2].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    return net


def test_two_layers_by_hand():
    # |W1| 1 = (1 + 2, 3 + 4) = (3, 7) and R = 5 * 3 + 6 * 7 = 57
    # layer 1: |w_ij| times |v_i|: 1*5, 2*5, 3*6, 4*6; layer 2: |v_i| times hidden unit i: 5*3, 6*7
    scores = synflow(two_layers(), in_shape=(2,))
    assert scores["0.weight"].tolist() == [[5.0, 10.0], [18.0, 24.0]]
    assert scores["2.weight"].tolist() == [[15.0, 42.0]]
    assert scores["0.weight"].sum() == scores["2.weight"].sum() == 57


def test_bias_takes_its_absolute_value():
    # |b1| = (2, 1) makes the hidden units 3 + 2 and 7 + 1, so layer 2 scores 5 * 5 and 6 * 8
    net = two_layers(bias=True)
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([-2.0, 1.0]))
    assert synflow(net, in_shape=(2,))["2.weight"].tolist() == [[25.0, 48.0]]


def test_scores_of_every_layer_sum_to_the_flow():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    )
    scores = synflow(net, torch.randn(4, 2, 8, 8))
    positive = copy.deepcopy(net).double()
    with torch.no_grad():
        for p in positive.parameters():
            p.abs_()
        flow = positive(torch.ones(1, 2, 8, 8, dtype=torch.float64)).sum().item()
    assert len(scores) == 4
    for score in scores.values():  # a sum of n positive terms is right to about n eps
        assert score.sum().item() == pytest.approx(flow, rel=1e-12)


@pytest.mark.parametrize("depth", [20, 44])
def test_every_layer_of_a_resnet_scores(depth):
    scores = synflow(resnet(depth), in_shape=(3, 8, 8))
    assert len(scores) == depth + 2  # two shortcut convolutions
    for name, score in scores.items():
        assert score.dtype == torch.float64 and torch.isfinite(score).all() and (score > 0).any(), name


def test_float32_would_overflow():
    # the reason for float64: a ResNet-44's scores exceed the largest float32
    most = max(score.max().item() for score in synflow(resnet(44), in_shape=(3, 8, 8)).values())
    assert most > torch.finfo(torch.float32).max


def test_norm_by_hand():
    # mean -3, variance 4 (eps 0), weight -2, bias 1: from 5 the layer makes (5 + 3) / 2 * 2 + 1 = 9
    # then R = 7 * 9 = 63; linear 0: |5| * 2 / 2 * 7 = 35; linear 2: 7 * 9 = 63
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, eps=0.0), nn.Linear(1, 1, bias=False))
    for sign in (1, -1):
        with torch.no_grad():
            net[0].weight.fill_(5.0)
            net[1].running_mean.fill_(sign * 3.0)
            net[1].running_var.fill_(4.0)
            net[1].weight.fill_(-2.0)
            net[1].bias.fill_(1.0)
            net[2].weight.fill_(-7.0)
        scores = synflow(net.train(), in_shape=(1,))
        assert scores["0.weight"].item() == 35 and scores["2.weight"].item() == 63


@pytest.mark.parametrize("trouble", ["running mean of raw pixels", "zero-initialised branches", "group norm"])
def test_no_norm_stops_the_flow(trouble):
    net = resnet(20)
    for name, module in list(net.named_modules()):
        if not isinstance(module, nn.BatchNorm2d):
            continue
        if trouble == "running mean of raw pixels":
            module.running_mean.fill_(1000.0)
        elif trouble == "zero-initialised branches" and name.endswith("norm2"):
            nn.init.zeros_(module.weight)
        elif trouble == "group norm":
            parent, leaf = name.rpartition(".")[::2]
            setattr(net.get_submodule(parent), leaf, nn.GroupNorm(2, module.num_features))
    for name, score in synflow(net, in_shape=(3, 8, 8)).items():
        assert torch.isfinite(score).all() and (score > 0).any(), name


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(3), (2, 3)),
        (nn.InstanceNorm1d(2, affine=True), (2, 3)),
        (nn.InstanceNorm1d(2), (2, 3)),
        (nn.BatchNorm1d(2, track_running_stats=False), (2, 3)),
        (nn.BatchNorm1d(2, affine=False), (2, 3)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_norms_of_the_input_itself_pass_it_on(norm, shape):
    # 2 rows of 3 ones through weights of one: each weight scores 2, less 5e-6 for the eps of running statistics
    net = nn.Sequential(norm, nn.Linear(3, 2, bias=False))
    nn.init.ones_(net[1].weight)
    score = synflow(net, in_shape=shape)["1.weight"]
    assert torch.allclose(score, torch.full_like(score, 2.0), rtol=1e-5, atol=0)


def test_only_the_shape_of_the_data_counts():
    net, (x, y) = resnet(20), batch()
    reference = synflow(net, in_shape=(3, 8, 8))
    for data in (x, (x, y), [(x * 100, y.flip(0))], [x]):
        assert all(torch.equal(s, reference[n]) for n, s in synflow(net, data).items())


def test_mode_and_model_stay_as_they_were():
    net = resnet(20).train()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    a = synflow(net, in_shape=(3, 8, 8))
    assert net.training and all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    b = synflow(net.eval(), in_shape=(3, 8, 8))
    assert all(torch.equal(a[n], b[n]) for n in a) and all(p.grad is None for p in net.parameters())


def test_works_where_gradients_are_off():
    with torch.no_grad():
        assert synflow(two_layers(), in_shape=(2,))["2.weight"].tolist() == [[15.0, 42.0]]


def test_a_hundred_steps_keep_the_flow_that_one_shot_cuts():
    # 2 x 64, 64 x 64 and 64 x 2 weights of 0.9 to 1.1: every layer's scores sum to R, so the 4096 middle ones score
    # about 1/32 of the outer ones, and one shot to 131 of 4352 takes them all (Tanaka et al. 2020, section 5)
    net = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((2, 64), (64, 64), (64, 2))))
    generator = torch.Generator().manual_seed(0)
    for layer in net:
        nn.init.uniform_(layer.weight, 0.9, 1.1, generator=generator)
    find = {"score": "synflow", "granularity": "weight", "sparsity": 0.97, "in_shape": (2,)}
    with pytest.raises(ValueError, match=r"would empty 1\.weight; lower it"):
        pst.at_init(net, **find, steps=1)
    ticket = pst.at_init(net, **find)
    assert ticket.provenance["steps"] == 100 and sum(int(m.sum()) for m in ticket.masks.values()) == 131
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            net.get_parameter(name).mul_(mask)
        assert net(torch.ones(1, 2)).sum() > 0


def test_masks_are_those_of_the_published_rule():
    # Tanaka et al. 2020, algorithm 1, spelled out on a fresh net: masks multiplied in, the whole state absolute
    net, density, steps = resnet(8), 0.1, 6
    masks = {n: torch.ones_like(w, dtype=torch.float64) for n, w in prunable(net).items()}
    total = sum(m.numel() for m in masks.values())
    for e in range(steps):
        twin = copy.deepcopy(net).double().eval()
        twin.load_state_dict({n: t.abs() for n, t in twin.state_dict().items()})
        with torch.no_grad():
            for name, mask in masks.items():
                twin.get_parameter(name).mul_(mask)
        twin(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum().backward()
        scores = {n: (p.grad * p).detach().abs() for n in masks for p in [twin.get_parameter(n)]}
        flat = torch.cat([s.flatten() for s in scores.values()])
        threshold = flat.sort(descending=True).values[round(density ** ((e + 1) / steps) * total) - 1]
        masks = {n: (s >= threshold).double() for n, s in scores.items()}
    find = {"score": "synflow", "granularity": "weight", "sparsity": 1 - density, "in_shape": (3, 8, 8)}
    ticket = pst.at_init(net, **find, steps=steps, allow_empty=True)
    assert all(torch.equal(ticket.masks[n], m.bool()) for n, m in masks.items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: synflow(two_layers()), "needs the shape of an input"),
        (lambda: synflow(two_layers(), torch.ones(2, 2, dtype=torch.long)), "which a model of torch.int64 inputs"),
        (lambda: synflow(nn.LSTM(2, 2)), "no Linear or Conv2d weight"),
        (lambda: synflow(Tuple(), in_shape=(2,)), "must be a tensor, not tuple"),
        (lambda: synflow(huge(), in_shape=(2,)), r"synflow scores of 0\.weight overflow float64"),
    ],
)
def test_bad_input_gets_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x), x


def huge():
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    for layer in net:
        nn.init.constant_(layer.weight, 1e30)
    return net
