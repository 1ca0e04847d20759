"""Filter tickets on networks whose channels hang together: exact, compact, and the masked network's function."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.measure import macs, parameters
from pysparse_ticket.ticket import fingerprint


class Residual(nn.Module):
    """stem and b are added; a lies between them alone; the projection p and d are added; p and c read the first sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a, self.b, self.norm_b = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c, self.d = nn.Conv2d(4, 3, 3, 2, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.p = nn.Conv2d(4, 6, 1, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm_b(self.b(torch.sigmoid(self.a(x)))) + x)
        x = F.relu(self.d(F.relu(self.c(x))).add_(self.p(x)))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenations of concatenations, as in a DenseNet; the norm spans all three parts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(5, 4, 1)
        self.norm, self.fc = nn.BatchNorm2d(9), nn.Linear(9, 5)

    def forward(self, x):
        a = F.relu(self.a(x))
        ab = torch.cat([a, self.b(a)], 1)
        y = torch.sigmoid(self.norm(torch.cat((ab, self.c(ab)), dim=1)))
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Gated(nn.Module):
    """MobileNet's block: expansion, depthwise convolution of two filters a channel, gate, projection, residual add."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand, self.norm1 = nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.depth, self.norm2 = nn.Conv2d(5, 10, 3, padding=1, groups=5), nn.BatchNorm2d(10)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(10, 2, 1), nn.SiLU(), nn.Conv2d(2, 10, 1))
        self.project, self.head = nn.Conv2d(10, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        h = F.silu(self.norm2(self.depth(F.silu(self.norm1(self.expand(x))))))
        x = x + self.project(h * torch.sigmoid(self.gate(h)))
        return self.head(x.mean([2, 3]))


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 7),
        nn.ReLU(),
        nn.Linear(7, 5),
    )


# For each network: the removed filters, and what that zeroes in the masked network as (module, "out" | "in", channels).
CASES = {
    "residual": (
        Residual,
        {"stem": [1], "a": [0, 3], "b": [1], "c": [2], "d": [0, 5], "p": [0, 5]},
        {
            "out": {"stem": [1], "norm": [1], "a": [0, 3], "b": [1], "norm_b": [1], "c": [2], "d": [0, 5], "p": [0, 5]},
            "in": {"a": [1], "b": [0, 3], "c": [1], "p": [1], "d": [2], "fc": [0, 5]},
        },
    ),
    "concatenation": (
        Dense,
        {"a": [2], "b": [0], "c": [1, 3]},
        # ab is (a0 a1 a2 b0 b1), the last one (a0 a1 a2 b0 b1 c0 c1 c2 c3)
        {
            "out": {"a": [2], "b": [0], "c": [1, 3], "norm": [2, 3, 6, 8]},
            "in": {"b": [2], "c": [2, 3], "fc": [2, 3, 6, 8]},
        },
    ),
    "depthwise and gate": (
        Gated,
        # filters 2 and 3 of the depthwise convolution read channel 1
        {"expand": [1], "depth": [2, 3], "gate.3": [2, 3], "gate.1": [0], "stem": [0], "project": [0]},
        {
            "out": {
                "expand": [1], "norm1": [1], "depth": [2, 3], "norm2": [2, 3], "gate.3": [2, 3], "gate.1": [0],
                "stem": [0], "project": [0],
            },
            "in": {"expand": [0], "gate.1": [2, 3], "gate.3": [0], "project": [2, 3], "head": [0]},
        },
    ),
    "flatten": (
        vgg,
        {"0": [3], "4": [1, 2]},
        # 8x8 images have 2x2 pixels behind two poolings: channel c is features 4c to 4c + 3
        {"out": {"0": [3], "1": [3], "4": [1, 2]}, "in": {"4": [3], "8": [4, 5, 6, 7, 8, 9, 10, 11]}},
    ),
}  # fmt: skip


def keep(count, removed):
    kept = torch.ones(count, dtype=torch.bool)
    kept[removed] = False
    return kept


def parts(name):
    """The dense network, its ticket and {parameter: mask} of the masked network."""
    make, filters, zeros = CASES[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # ones and zeros would hide a mixed-up channel
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    masks = {key: torch.ones_like(p, dtype=torch.bool) for key, p in model.named_parameters()}
    for module, channels in zeros["out"].items():
        for leaf in ("weight", "bias"):
            if f"{module}.{leaf}" in masks:
                masks[f"{module}.{leaf}"][channels] = False
    for module, channels in zeros["in"].items():
        masks[f"{module}.weight"][:, channels] = False
    filters = {n: keep(model.get_submodule(n).out_channels, gone) for n, gone in filters.items()}
    return model, pst.Ticket(filters=filters), masks


def masked(model, masks):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for key, mask in masks.items():
            twin.get_parameter(key).mul_(mask)
    return twin


def compact(masks, key, tensor):
    """The part of a tensor of the dense parameter's shape that the compact one holds."""
    mask = masks[key]
    for dim in range(min(mask.dim(), 2)):
        index = mask.movedim(dim, 0).flatten(1).any(1) if mask.dim() > 1 else mask
        tensor = tensor.index_select(dim, index.nonzero().flatten())
    return tensor


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_compact_network_is_the_masked_one(name, training):
    model, ticket, masks = parts(name)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    twin = masked(model, masks).double().train(training)
    sparse = pst.sparsify(copy.deepcopy(model).double().train(training), ticket)
    expected, actual = twin(x), sparse(x)
    # float64 sums of at most 90 products in another order, five layers deep
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    expected.backward(grad)
    actual.backward(grad)
    for key, parameter in sparse.named_parameters():
        wanted = compact(masks, key, twin.get_parameter(key).grad)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-11, msg=key)
    assert parameters(sparse) == sum(compact(masks, k, p).numel() for k, p in model.named_parameters())
    for key, buffer in sparse.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            mask = masks[re.sub("running_.*", "weight", key)]
            torch.testing.assert_close(buffer, twin.get_buffer(key)[mask], rtol=1e-10, atol=1e-12, msg=key)


def test_macs_of_each_layer_are_those_of_the_channels_left():
    x = torch.randn(1, 3, 8, 8)
    # kept in x out x taps x pixels: stem 3*3*9*64, a 3*3*9*64, b 3*3*9*64, c 3*2*9*16, d 2*4*9*16, p 3*4*16, fc 4*5
    model, ticket, _ = parts("residual")
    assert macs(pst.sparsify(model, ticket), x) == 3 * 81 * 64 + 54 * 16 + 72 * 16 + 12 * 16 + 20
    # stem 3*3*9*64, expand 3*4*64, depth 8*9*64, gate 8*1 + 1*8, project 8*3*64, head 3*5
    model, ticket, _ = parts("depthwise and gate")
    assert macs(pst.sparsify(model, ticket), x) == 64 * (81 + 12 + 72 + 24) + 16 + 15
    # 3*3*9*64, 3*4*9*16, 16*7, 7*5
    model, ticket, _ = parts("flatten")
    assert macs(pst.sparsify(model, ticket), x) == 81 * 64 + 108 * 16 + 112 + 35


@pytest.mark.parametrize("name", CASES)
def test_state_dict_and_optimizer_are_carried_there_and_back(name):
    """Steps of the compact network with carried momentum are steps of the masked network."""
    model, ticket, masks = parts(name)
    model.double()
    twin = copy.deepcopy(model)
    x, y = batch(4)
    x, y = x.double(), y % 5
    nets = [(net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.01)) for net in (model, twin)]

    def step(net, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    def mask(optimizer):
        with torch.no_grad():
            for key, one in masks.items():
                p = twin.get_parameter(key)
                for t in (p, optimizer.state[p]["momentum_buffer"]):
                    t.mul_(one)

    for net, optimizer in nets:
        step(net, optimizer)
    dense_state = copy.deepcopy(model.state_dict())
    pst.sparsify(model, ticket, optimizer=nets[0][1])
    mask(nets[1][1])
    for _ in range(2):
        for net, optimizer in nets:
            step(net, optimizer)
        mask(nets[1][1])
    state = model.state_dict()
    assert {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in dense_state.items()}
    for key in masks:
        torch.testing.assert_close(state[key], twin.get_parameter(key).data, rtol=1e-9, atol=1e-11, msg=key)
    expected = model.eval()(x)
    fresh = CASES[name][0]().double()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.eval()(x), expected, rtol=1e-9, atol=1e-11)
    dense = pst.densify(model, optimizer=nets[0][1])
    assert not any(type(m).__module__.startswith("pysparse_ticket.nn") for m in dense.modules())
    torch.testing.assert_close(dense(x), expected, rtol=1e-9, atol=1e-11)
    assert {id(p) for p in nets[0][1].state} == {id(p) for p in dense.parameters()}
    for key, p in dense.named_parameters():
        ours, theirs = (
            o.state[q]["momentum_buffer"] for (_, o), q in zip(nets, (p, twin.get_parameter(key)), strict=True)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=key)
    again = pst.sparsify(CASES[name][0]().double(), ticket)
    again.load_state_dict(dense_state)
    assert parameters(again) < sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("name", CASES)
def test_the_dense_format_computes_the_same(name):
    model, ticket, masks = parts(name)
    x = torch.randn(3, 3, 8, 8)
    twin = masked(model, masks)
    sparse = pst.sparsify(model, ticket, plan="dense")
    assert {row.format for row in pst.plan(sparse).layers} == {"dense"}
    # float32 sums of at most 90 products, five layers deep
    torch.testing.assert_close(sparse(x), twin(x), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sparse(x).square().sum().backward()
        optimizer.step()
    for key, p in pst.densify(sparse).named_parameters():
        assert p.dim() == 1 or not p[~masks[key]].any(), key  # biases of channels that nobody reads stay as they were


def test_resnet20_with_coupled_filters():
    model, (x, y) = resnet(20).double(), batch()
    x = x.double()
    ticket = pst.at_init(model, score="random", granularity="filter", remove=400, seed=1)
    left = {name: int(kept.sum()) for name, kept in ticket.filters.items()}
    assert sum(left.values()) == sum(kept.numel() for kept in ticket.filters.values()) - 400
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in ticket.filters.items():
            norm = name.replace("conv", "norm").replace("stem", "stem_norm").replace("shortcut.0", "shortcut.1")
            for parameter in (twin.get_submodule(name).weight, *twin.get_submodule(norm).parameters()):
                parameter[~kept] = 0
    sparse = pst.sparsify(copy.deepcopy(model), ticket)
    widths = [left["stem"], left["stage2.0.conv2"], left["stage3.0.conv2"]]
    assert all(w < full for w, full in zip(widths, (16, 32, 64), strict=True))
    F.cross_entropy(twin(x), y).backward()
    F.cross_entropy(sparse(x), y).backward()
    torch.testing.assert_close(sparse(x), twin(x), rtol=1e-9, atol=1e-10)
    for name, kept in ticket.filters.items():
        expected = twin.get_submodule(name).weight.grad[kept]
        actual = sparse.get_submodule(name).weight.grad
        inputs = expected.flatten(2).abs().sum((0, 2)) > 0  # of a removed channel, which is zero, it is zero
        torch.testing.assert_close(actual, expected[:, inputs], rtol=1e-8, atol=1e-10, msg=name)

    def block(name, given, made, pixels):
        inner = left[f"{name}.conv1"]
        projection = given * made * pixels if f"{name}.shortcut.0" in left else 0
        return 9 * pixels * (given * inner + inner * made) + projection

    count = 3 * 9 * widths[0] * 32 * 32 + 10 * widths[2]
    for stage, side in ((1, 32), (2, 16), (3, 8)):
        given = widths[max(stage - 2, 0)]
        for index in range(3):
            count += block(f"stage{stage}.{index}", given, widths[stage - 1], side * side)
            given = widths[stage - 1]
    assert macs(sparse.float(), torch.randn(1, 3, 32, 32)) == count


def test_filters_beside_removed_blocks():
    """A block that the ticket skips takes part in no channel any more."""
    model, (x, _) = resnet(20).double().eval(), batch()
    ticket = pst.at_init(model, score="random", granularity="filter", remove=300)
    ticket.layers = {"stage1.1": False, "stage3.2": False}
    both = pst.sparsify(copy.deepcopy(model), ticket)
    alone = pst.sparsify(model, pst.Ticket(filters=ticket.filters, architecture=fingerprint(model)))
    alone.stage1[1], alone.stage3[2] = nn.Identity(), nn.Identity()
    assert torch.equal(both(x.double()), alone(x.double()))


def test_masks_and_removed_channels_of_one_layer_are_refused():
    model = vgg()
    mask = torch.rand(7, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    ticket = pst.Ticket(masks={"8.weight": mask}, filters={"4": keep(6, [1])})
    with pytest.raises(ValueError, match="masks weights of 8 and removes channels that it makes or reads"):
        pst.sparsify(model, ticket)
    assert type(model[8]) is nn.Linear and type(model[4]) is nn.Conv2d
