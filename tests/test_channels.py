"""Which filters go together, which have to stay and why."""

import pytest
import torch
import torch.nn.functional as F
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.granularity import pool_units
from pysparse_ticket.search import filters_removed
from pysparse_ticket.select import drop_lowest_units
from pysparse_ticket.structure import find_channels


def test_a_resnets_stage_is_one_group():
    channels = find_channels(resnet(32))
    units = channels.units()
    # five free first convolutions a stage; its residual stream joins five second ones with the stem or the projection
    assert sum(len(unit) == 1 for unit in units.values()) == 5 * (16 + 32 + 64)
    assert sum(len(unit) == 6 for unit in units.values()) == 16 + 32 + 64
    assert sum(map(len, units.values())) == 1232
    assert [name for name, _ in units[channels.producers["stage2.0.shortcut.0"][7]]] == [
        "stage2.0.conv2", "stage2.0.shortcut.0", *(f"stage2.{b}.conv2" for b in (1, 2, 3, 4)),
    ]  # fmt: skip
    assert {name for unit in channels.units(coupled=False).values() for name, _ in unit} == {
        f"stage{s}.{b}.conv1" for s in (1, 2, 3) for b in range(5)
    }
    assert channels.readers["fc"] == channels.producers["stage3.4.conv2"]


class Net(nn.Module):
    """a, then what is to be tested, then b."""

    def __init__(self, middle, between=4, **layers):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(between, 2, 3, padding=1)
        self.middle = middle
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.b(self.middle(self, self.a(x))).mean((2, 3))


def twice(net, y):
    return net.again(net.again(y))


PINNED = {
    "output": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "0", "its output is the network's own"),
    "group norm": (lambda: Net(lambda n, y: n.g(y), g=nn.GroupNorm(2, 4)), "a", "goes into g, a GroupNorm"),
    "input added": (lambda: nn.Sequential(Skip(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 1, 1)), "0.f", "the network's input"),
    "softmax": (lambda: Net(lambda n, y: torch.softmax(y, 1)), "a", "goes into softmax"),
    "slice": (lambda: Net(lambda n, y: y[:, 1:], 3), "a", "goes into getitem"),
    "channel count": (lambda: Net(lambda n, y: y / y.shape[1]), "a", "a calculation with its channels' number"),
    "hard-coded view": (lambda: Net(lambda n, y: y.view(-1, 4, 8, 8)), "a", "goes into view"),
    "gate from a linear layer": (
        lambda: Net(lambda n, y: y * n.l(y.mean((2, 3)))[:, :, None, None], l=nn.Linear(4, 4)),
        "a",
        "is multiplied with the output of getitem",
    ),
    "one channel gates all": (
        lambda: Net(lambda n, y: y * n.c(y), c=nn.Conv2d(4, 1, 1)),
        "a",
        "multiplied with a tensor of another shape",
    ),
    "division": (lambda: Net(lambda n, y: y / (n.c(y) + 9), c=nn.Conv2d(4, 4, 1)), "a", "goes into truediv"),
    "called twice": (lambda: Net(twice, again=nn.Conv2d(4, 4, 1)), "a", "again is called more than once"),
    "three groups": (lambda: Net(lambda n, y: n.g(y), g=nn.Conv2d(4, 4, 3, 1, 1, groups=2)), "a", "g has 2 groups"),
    "circular padding": (
        lambda: Net(lambda n, y: n.c(y), c=nn.Conv2d(4, 4, 3, 1, 1, padding_mode="circular")),
        "a",
        "c pads with 'circular'",
    ),
    "weight read elsewhere": (
        lambda: Net(lambda n, y: F.conv2d(n.c(y), n.c.weight), c=nn.Conv2d(4, 4, 1)),
        "a",
        "the weights of c are read past the module",
    ),
    "parameter a channel": (lambda: Net(lambda n, y: n.p(y), p=nn.PReLU(4)), "a", "goes into p, a PReLU"),
    "linear layer over width": (lambda: Net(lambda n, y: n.l(y), l=nn.Linear(8, 8)), "a", "goes into l, a Linear"),
    "padded channels": (lambda: Net(lambda n, y: F.pad(y, (0, 0, 0, 0, 1, 1)), 6), "a", "goes into pad"),
    "concatenated rows": (lambda: Net(lambda n, y: torch.cat([y, y], 2)), "a", "concatenated"),
    "concatenated input": (lambda: InputBeside(), "a", "concatenated with channels that are not followed"),
}


class Skip(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x + self.f(x)


class InputBeside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.b(torch.cat([x, self.a(x)], 1)).mean((2, 3))


@pytest.mark.parametrize("name", PINNED)
def test_what_is_not_understood_stays_and_says_why(name):
    make, conv, words = PINNED[name]
    torch.manual_seed(0)
    model = make()
    model(torch.randn(2, 3, 8, 8))
    channels = find_channels(model)
    assert words in channels.refused[conv]
    assert not any(producer == conv for unit in channels.units().values() for producer, _ in unit)
    kept = torch.arange(model.get_submodule(conv).out_channels) != 1
    with pytest.raises(pst.TicketError, match=f"the filters of {conv} cannot be removed: "):
        pst.sparsify(model, pst.Ticket(filters={conv: kept}))


FREE = {
    "numbers": lambda n, y: (2 - y * 0.5) / 3 + 1,
    "scalar parameter": lambda n, y: y * n.scale,
    "interpolation to its own size": lambda n, y: F.interpolate(F.avg_pool2d(y, 2), size=y.shape[2:]),
    "padded pixels": lambda n, y: F.pad(y, (1, 0, 0, 1)),
    "calls": lambda n, y: F.dropout(F.gelu(y.contiguous()).clamp(min=-1), 0.0).sigmoid(),
    "type of its own": lambda n, y: y.to(y.dtype),
    "sum with itself": lambda n, y: y + F.relu(y),
    "pooled gate": lambda n, y: y * y.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", FREE)
def test_channelwise_operations_let_filters_go(name):
    torch.manual_seed(0)
    model = Net(FREE[name], scale=nn.Parameter(torch.tensor(0.5))).double()
    x, kept = torch.randn(2, 3, 8, 8).double(), torch.tensor([True, False, True, True])
    expected = Net(FREE[name], scale=model.scale).double()
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected.a.weight[1], expected.a.bias[1], expected.b.weight[:, 1] = 0, 0, 0
    sparse = pst.sparsify(model, pst.Ticket(filters={"a": kept}))
    assert sparse.a(x).shape[1] == 3
    torch.testing.assert_close(sparse(x), expected(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kept", "words"),
    [
        ("stem", [i != 3 for i in range(16)], r"keeps filter 3 of stage1\.0\.conv2 and removes the one of stem"),
        ("stage2.1.conv1", [False] * 32, r"removes every filter of stage2\.1\.conv1; at least one has to stay"),
        ("stem", [False] + [True] * 19, "has 20 filters for stem, which has 16"),
        ("fc", [False] + [True] * 9, "the filters of fc cannot be removed: it is not a convolution"),
    ],
    ids=["half a unit", "all", "length", "linear"],
)
def test_inconsistent_filters_are_refused(name, kept, words):
    model, ticket = resnet(20), pst.Ticket(filters={name: torch.tensor(kept)})
    before = [id(module) for module in model.modules()]
    with pytest.raises(pst.TicketError, match=words):
        pst.sparsify(model, ticket)
    assert [id(module) for module in model.modules()] == before


def test_units_pool_over_all_weights_of_their_filters():
    # filters of a: 1+2 and 3+4, of b: 5 and 6; the unit of a's second and b's first: 3+4+5 over three weights
    scores = {"a.weight": torch.arange(1.0, 5.0).reshape(2, 2, 1, 1), "b.weight": torch.tensor([[[[5.0]]], [[[6.0]]]])}
    units = [[("a", 0)], [("a", 1), ("b", 0)], [("b", 1)]]
    assert pool_units(scores, units, "sum").tolist() == [3.0, 12.0, 6.0]
    assert pool_units(scores, units, "mean").tolist() == [1.5, 4.0, 6.0]
    with pytest.raises(ValueError, match="unknown aggregate 'median'"):
        pool_units(scores, units, "median")


def dropped(scores, sizes, groups, remove, keep=1):
    kept = drop_lowest_units(torch.tensor(scores), sizes, groups, remove, keep)
    return (~kept).nonzero().flatten().tolist()


def test_exactly_as_many_filters_go_as_asked():
    # lowest first would take the unit of 3 (score 1) and leave 1 filter that no unit of 2 can give; 2 + 2 is 4
    assert dropped([1.0, 2.0, 3.0, 4.0, 9.0], [3, 2, 2, 2, 3], "abbba", 4) == [1, 2]
    assert dropped([1.0, 2.0, 3.0, 4.0, 9.0], [3, 2, 2, 2, 3], "abbba", 5) == [0, 1]
    # no unit of 2 helps to 3; each group keeps one
    assert dropped([9.0, 1.0, 2.0, 3.0, 9.5], [3, 2, 2, 2, 3], "abbba", 3) == [0]
    assert dropped([1.0, 2.0, 3.0, 1.0], [1, 1, 1, 1], "aabb", 2) == [0, 3]
    # of equal scores the earlier survives; what is pruned already goes first
    assert dropped([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1], "aaaa", 2) == [2, 3]
    assert dropped([1.0, -torch.inf, 0.5], [1, 1, 1], "aaa", 1) == [1]


def test_counts_that_cannot_be_had_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"cannot remove exactly 3 filters: .* 2 or 5 at a time, .* are 2 and 4"):
        dropped([1.0] * 5, [2, 2, 2, 5, 5], "aaabb", 3)
    with pytest.raises(ValueError, match="cannot remove 10 filters: of 16 candidates 9 can go, since every"):
        dropped([1.0] * 5, [2, 2, 2, 5, 5], "aaabb", 10)


@pytest.mark.parametrize("score", ["random", "magnitude", "grasp"])
@pytest.mark.parametrize("remove", [1, 77, 500])
def test_coupled_tickets_have_the_exact_count_and_keep_a_filter(score, remove):
    model = resnet(20)
    ticket = pst.at_init(model, batch(), score=score, granularity="filter", remove=remove, aggregate="mean")
    assert sum(int((~kept).sum()) for kept in ticket.filters.values()) == remove
    assert all(kept.any() for kept in ticket.filters.values())
    find_channels(model).removed(ticket.filters)
    free = pst.at_init(model, batch(), score=score, granularity="filter", remove=min(remove, 300), coupled=False)
    assert all(name.endswith("conv1") for name in free.filters)


def test_the_lowest_coupled_unit_goes():
    model = resnet(20)
    with torch.no_grad():
        for conv in (model.stage2[0].conv2, model.stage2[0].shortcut[0], model.stage2[1].conv2, model.stage2[2].conv2):
            conv.weight[5] *= 1e-3
    ticket = pst.at_init(model, score="magnitude", granularity="filter", remove=4)
    gone = {name: (~kept).nonzero().flatten().tolist() for name, kept in ticket.filters.items() if not kept.all()}
    assert gone == {"stage2.0.conv2": [5], "stage2.0.shortcut.0": [5], "stage2.1.conv2": [5], "stage2.2.conv2": [5]}


def test_a_network_without_such_filters_says_so():
    with pytest.raises(ValueError, match="Sequential has no filter that can be removed: 0: its output is the"):
        pst.at_init(nn.Sequential(nn.Conv2d(3, 4, 3)), score="magnitude", granularity="filter", remove=1)
    with pytest.raises(ValueError, match=r"cannot remove exactly 1 filters: .* 2 at a time, so the nearest .* 0 and 2"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), Skip(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 1, 1))
        pst.at_init(model, score="magnitude", granularity="filter", remove=1)
    with pytest.raises(ValueError, match="each is coupled with others"):
        pst.at_init(model, score="magnitude", granularity="filter", remove=1, coupled=False)


def test_filter_twin_of_resnet32_keeps_1200_and_1168_of_1232_filters():
    """The counts that Jordao et al. 2023 give for one and two blocks removed, both of the first stage."""
    model = resnet(32)
    for blocks, left in ((["stage1.1"], 1200), (["stage1.1", "stage1.3"], 1168)):
        layer_ticket = pst.Ticket(layers=dict.fromkeys(blocks, False))
        twin = pst.filter_twin(model, layer_ticket, batch(), score="magnitude", aggregate="mean")
        assert sum(int(kept.sum()) for kept in twin.filters.values()) == left
        assert twin.provenance["twin_of"] == blocks
    deep = pst.at_init(model, batch(), score="random", granularity="layer", remove=9, seed=3)
    twin = pst.filter_twin(model, deep, batch())
    removed = sum(int((~kept).sum()) for kept in twin.filters.values())
    assert removed == filters_removed(model, deep) and twin.provenance["score"] == "random"
    with pytest.raises(ValueError, match="does not say which score found it"):
        pst.filter_twin(model, layer_ticket, batch())
    with pytest.raises(ValueError, match="removes no convolution"):
        pst.filter_twin(model, pst.Ticket(), score="random")
