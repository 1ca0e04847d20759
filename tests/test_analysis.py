"""Analyses of tickets against values worked out by hand."""

import copy
import math

import pytest
import torch
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.analysis import (
    cka_between,
    collapsed_layers,
    layer_profile,
    linear_connectivity,
    sign_flips,
    ticket_cka,
    weight_spread,
    weight_travel,
)

TRAJECTORY = [
    {"w": torch.tensor([1.0, -1.0, 2.0, 0.5]), "count": torch.tensor(1)},
    {"w": torch.tensor([2.0, 1.0, 0.0, 0.0]), "count": torch.tensor(2)},
    {"w": torch.tensor([3.0, -1.0, -2.0, 0.0]), "count": torch.tensor(3)},
    {"w": torch.tensor([4.0, -3.0, -2.0, 1.5]), "count": torch.tensor(4)},
]


def test_sign_flips_by_hand():
    # never; - + - -: 2; + 0 - -: 1, across the zero; + 0 0 +: none, a pruned weight has no sign. Counts are no weights.
    flips = sign_flips(TRAJECTORY)
    assert list(flips) == ["w"] and flips["w"].tolist() == [0, 2, 1, 0] and flips["w"].dtype == torch.int64


def test_weight_spread_and_travel_by_hand():
    # 1 2 3 4: mean 2.5, squares 2.25 .25 .25 2.25, mean 1.25; -1 1 -1 -3: mean -1, squares 0 4 0 4, mean 2
    spread = weight_spread(TRAJECTORY)["w"]
    assert spread[:2].tolist() == pytest.approx([math.sqrt(1.25), math.sqrt(2)], rel=1e-12)
    assert weight_travel(TRAJECTORY)["w"].tolist() == [3, 2, 4, 1]


@pytest.mark.parametrize(
    ("trajectory", "words"),
    [
        (TRAJECTORY[:1], "two steps or more, not of 1"),
        ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], "no weight is in every step"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(3)}], "a changes its shape along the trajectory"),
    ],
)
def test_bad_trajectories_are_refused(trajectory, words):
    with pytest.raises(ValueError, match=words):
        sign_flips(trajectory)


def test_overlap_of_three_tickets_is_the_share_of_one_ticket_that_all_keep():
    # Vandersmissen et al. 2023: at a density of 3.52% three tickets share 9.34% of what one keeps, which is
    # 9.34% * 3.52% = 0.33% of all connections. Here of 10^6 weights 35,200 stay in each and 3,288 in all three.
    masks = []
    for i in range(3):
        mask = torch.zeros(1_000_000, dtype=torch.bool)
        mask[:3288] = True
        mask[100_000 * (i + 1) : 100_000 * (i + 1) + 35_200 - 3288] = True
        masks.append({"w": mask})
    found = pst.overlap(*masks)
    assert round(100 * found["overlap"], 2) == 9.34 and round(100 * found["overlap"] * 0.0352, 2) == 0.33
    assert found["iou"] == 3288 / (3 * 35_200 - 2 * 3288)
    assert found["chance"] == pytest.approx(0.0352**2, rel=1e-12)  # each of the other two keeps a weight at 3.52%


def mlp():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))


def masks_of(model, **changed):
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
    return masks | {f"{n[1:]}.weight": torch.tensor(m, dtype=torch.bool) for n, m in changed.items()}


def test_layer_profile_counts_masks_blocks_and_filters():
    model = mlp()
    ticket = pst.Ticket(masks=masks_of(model, _2=[[1, 0, 0], [0, 0, 1]]))
    assert [(r.name, r.kept, r.total) for r in layer_profile(ticket)] == [
        ("0.weight", 6, 6),
        ("2.weight", 2, 6),
        ("4.weight", 2, 2),
    ]
    assert layer_profile(ticket)[1].sparsity == pytest.approx(4 / 6)

    net = resnet(14)
    for options in ({"granularity": "layer", "remove": 1, "keep": 1}, {"granularity": "filter", "remove": 20}):
        ticket = pst.at_init(net, batch(), score="magnitude", **options)
        rows = layer_profile(ticket)
        assert len(rows) == 1 + 6 * 2 + 2 + 1  # stem, blocks, projections, classifier
        gone = sum(row.total - row.kept for row in rows)
        assert gone / sum(row.total for row in rows) == pytest.approx(ticket.sparsity, rel=1e-12) and gone > 0
    assert {r.kept for r in layer_profile(pst.at_init(net, batch(), remove=1, keep=1)) if r.kept < r.total} == {0}


def test_an_emptied_layer_cuts_off_its_neighbours():
    model, x = mlp(), torch.zeros(1, 2)
    ticket = pst.Ticket(masks=masks_of(model, _2=[[0, 0, 0], [0, 0, 0]]))
    assert collapsed_layers(ticket) == {"2.weight": "empty"}
    nn.init.constant_(model[2].bias, 5.0)  # a bias carries nothing of the input
    before = copy.deepcopy(model.state_dict())
    assert collapsed_layers(ticket, model, x) == {
        "0.weight": "cut off from the output",
        "2.weight": "empty",
        "4.weight": "cut off from the input",
    }
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_layers_that_miss_each_other_are_cut_off_though_none_is_empty():
    model, x = mlp(), torch.zeros(1, 2)
    # layer 0 feeds unit 0 alone, layer 2 reads units 1 and 2
    ticket = pst.Ticket(masks=masks_of(model, _0=[[1, 1], [0, 0], [0, 0]], _2=[[0, 1, 1], [0, 1, 1]]))
    assert collapsed_layers(ticket) == {}
    assert collapsed_layers(ticket, model, x) == {
        "0.weight": "cut off from the output",
        "2.weight": "cut off from the input",
        "4.weight": "cut off from the input",
    }
    # one path is enough: 0 -> unit 0 -> unit 1 -> out
    thin = masks_of(model, _0=[[1, 0], [0, 0], [0, 0]], _2=[[0, 0, 0], [1, 0, 0]], _4=[[0, 1]])
    assert collapsed_layers(pst.Ticket(masks=thin), model, x) == {}


def test_a_residual_path_keeps_what_follows_an_empty_branch_alive():
    model, (x, _) = resnet(14), batch()
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
    masks["stage2.1.conv1.weight"][:] = False
    assert collapsed_layers(pst.Ticket(masks=masks), model, x) == {
        "stage2.1.conv1.weight": "empty",
        "stage2.1.conv2.weight": "cut off from the input",
    }
    removed = pst.Ticket(masks=masks, layers={"stage2.1": False})
    assert collapsed_layers(removed, model, x) == {} == collapsed_layers(removed)


def test_depth_neither_overflows_nor_vanishes():
    # weights of 1 would reach 10^350 here, and infinity times an empty layer is no zero
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(350)))
    whole = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
    sample = torch.zeros(1, 10)
    assert collapsed_layers(pst.Ticket(masks=whole), model, sample) == {}
    found = collapsed_layers(pst.Ticket(masks=whole | {"348.weight": ~whole["348.weight"]}), model, sample)
    why = ["cut off from the output"] * 348 + ["empty", "cut off from the input"]
    assert found == {f"{i}.weight": reason for i, reason in enumerate(why)}
    with pytest.raises(ValueError, match="needs sample="):
        collapsed_layers(pst.Ticket(masks=whole), model)


def test_what_a_removed_block_did_to_the_signal_does_not_count():
    class Negate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return -self.fc(x)

    model = nn.Sequential(nn.Linear(2, 2), Negate(), nn.ReLU(), nn.Linear(2, 1))
    sample = torch.zeros(1, 2)
    assert collapsed_layers(pst.Ticket(layers={"1": False}, architecture=_names(model)), model, sample) == {}
    kept = collapsed_layers(pst.Ticket(layers={"1": True}, architecture=_names(model)), model, sample)
    assert kept["3.weight"] == "cut off from the input"


def _names(model):
    return tuple((n, tuple(p.shape)) for n, p in model.named_parameters())


class Product(nn.Module):
    def __init__(self, a=0.0, b=0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))


def test_barrier_of_a_model_of_two_parameters():
    # on the line from (1, 0) to (0, 1) the product a b is alpha (1 - alpha): 0 at both ends, 1/4 in the middle
    a, b = Product(1.0, 0.0).state_dict(), Product(0.0, 1.0).state_dict()
    error = linear_connectivity(Product(), a, b, lambda m: float(m.a * m.b))
    assert len(error.alphas) == 21 and error.alphas[1] == 0.05
    assert error.values == pytest.approx([i / 20 * (1 - i / 20) for i in range(21)], abs=1e-7)
    assert error.max_rise == pytest.approx(0.25) and error.max_drop == 0
    accuracy = linear_connectivity(Product(), a, b, lambda m: 1 - float(m.a * m.b), points=3)
    assert accuracy.values == (1, 0.75, 1) and accuracy.max_drop == 0.25 and accuracy.max_rise == 0
    # unequal ends: a runs from 1 to 3, the barrier is taken from their mean
    slope = linear_connectivity(
        Product(), Product(1.0).state_dict(), Product(3.0).state_dict(), lambda m: float(m.a), points=5
    )
    assert slope.values == (1, 1.5, 2, 2.5, 3) and slope.max_rise == 1 == slope.max_drop


def test_running_statistics_are_averaged_or_measured_anew():
    model = nn.BatchNorm1d(1).train()
    a, b = copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict())
    a["running_mean"], b["running_mean"] = torch.tensor([2.0]), torch.tensor([6.0])
    a["num_batches_tracked"], b["num_batches_tracked"] = torch.tensor(3), torch.tensor(8)
    before = copy.deepcopy(model.state_dict())
    seen = []

    def look(m):
        assert not m.training
        seen.append((float(m.running_mean), float(m.running_var), int(m.num_batches_tracked)))
        return 0.0

    linear_connectivity(model, a, b, look, points=3)
    assert seen == [(2, 1, 3), (4, 1, 6), (6, 1, 8)]  # 5.5 batches rounded to even
    seen.clear()
    # batches (0, 2) and (4, 6): means 1 and 5, sample variances 2 and 2
    data = [torch.tensor([[0.0], [2.0]]), (torch.tensor([[4.0], [6.0]]), torch.tensor([0, 1]))]
    linear_connectivity(model, a, b, look, points=2, recalibrate=data)
    assert seen == [(3, 2, 2)] * 2
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_bad_lines_are_refused():
    state = Product().state_dict()
    with pytest.raises(ValueError, match="two points or more, not 1"):
        linear_connectivity(Product(), state, state, float, points=1)
    with pytest.raises(ValueError, match="second state is not of this model: they differ in b"):
        linear_connectivity(Product(), state, {"a": state["a"]}, float)


class Features(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner, self.function = nn.Identity(), function

    def forward(self, x):
        return self.inner(self.function(x))


def test_cka_between_two_models_by_hand():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    line, curve = Features(lambda x: 2 * x + 1), Features(lambda x: x + x**2)
    # squared correlation of (0, 1, 2) and (0, 2, 6): 36 / (2 * 56 / 3) = 27 / 28
    assert cka_between(line, curve, x, ["inner"])["inner"] == pytest.approx(27 / 28, rel=1e-9)
    assert cka_between(line, line, [(x[:2],), (x[2:],)], {"inner": ""}) == pytest.approx({"inner": 1.0})


def test_cka_of_a_ticket_with_its_dense_network():
    model, data = nn.Sequential(nn.Linear(2, 2, bias=False)), torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    ticket = pst.Ticket(masks={"0.weight": torch.tensor([[True, False], [False, False]])})
    # the whole plane against one axis of it: 4 / (2 sqrt 2 * 2)
    assert ticket_cka(model, ticket, data, ["0"])["0"] == pytest.approx(1 / math.sqrt(2), rel=1e-12)
    assert torch.equal(model[0].weight, torch.eye(2))

    net, (x, y) = resnet(14), batch(16)
    layers = pst.at_init(net, (x, y), score="magnitude", remove=1, keep=1)
    [gone] = layers.removed_blocks
    found = ticket_cka(net, layers, x)
    blocks = [f"stage{s}.{b}" for s in (1, 2, 3) for b in (0, 1)]
    assert list(found) == [b for b in blocks if b != gone]
    before = blocks.index(gone)
    assert all(found[b] == pytest.approx(1, rel=1e-9) for b in blocks[:before])  # untouched up to the removed block
    assert all(found[b] < 1 - 1e-6 for b in blocks[before + 1 :]) and blocks[before + 1 :]
    twin = pst.sparsify(copy.deepcopy(net), layers)
    assert cka_between(net, twin, x, list(found)) == pytest.approx(found, rel=1e-9)
    filters = pst.at_init(net, (x, y), score="magnitude", granularity="filter", remove=3)
    with pytest.raises(pst.TicketError, match="removes filters"):
        ticket_cka(net, filters, x)
