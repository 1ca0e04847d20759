"""Iterated pruning of filters that go together: exact counts, against masks worked out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst


def conv(rows):
    weight = torch.tensor(rows, dtype=torch.float)[:, :, None, None]
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


class Small(nn.Module):
    """A residual block of 1x1 convolutions: stem and b are added, so their filters go in pairs; those of a go alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = conv([[1], [-3]]), conv([[1, -1], [2, 2], [5, 1]])
        self.b, self.fc = conv([[1, 2, -3], [1, 1, 1]]), nn.Linear(2, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.fc((self.b(F.relu(self.a(x))) + x).mean((2, 3)))


class Pairs(nn.Module):
    """Nothing but pairs: four of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.b, self.fc = conv([[1], [2], [3], [4]]), conv(torch.eye(4).tolist()), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((self.b(x) + x).mean((2, 3)))


def bits(ticket):
    return {name: kept.int().tolist() for name, kept in ticket.filters.items()}


def levels_of(model, **options):
    search = pst.imp(model, granularity="filter", **options)
    for _ in search:
        pass
    return search.levels


def count(ticket):
    return sum(int(kept.sum()) for kept in ticket.filters.values())


def test_pairs_and_single_filters_go_by_their_sums_of_what_is_left():
    levels = levels_of(Small(), sparsities=[1 / 7, 3 / 7, 4 / 7])
    # sums over weights: stem 0 + b 0: 1 + 6, stem 1 + b 1: 3 + 3; a: 2, 4, 6. One filter goes: a 0
    assert bits(levels[1].ticket) == {"stem": [1, 1], "a": [0, 1, 1], "b": [1, 1]}
    # b no longer reads a 0: the pairs are worth 1 + 5 and 3 + 2. Two go: not a 1 (4), since a keeps one filter and no
    # single one would be left to go with it, but the second pair
    assert bits(levels[2].ticket) == {"stem": [1, 0], "a": [0, 1, 1], "b": [1, 0]}
    # a no longer reads stem 1: 2 and 5. One goes: a 1
    assert bits(levels[3].ticket) == {"stem": [1, 0], "a": [0, 0, 1], "b": [1, 0]}


def test_the_mean_counts_the_weights_that_are_left():
    model = Small()
    model.a.weight.data *= 2
    levels = levels_of(model, sparsities=[2 / 7, 3 / 7], aggregate="mean")
    # 7 / 4 and 6 / 4 a weight of the pairs; 2, 4 and 6 of a, whose sums are 4, 8 and 12. Two go: a pair
    assert bits(levels[1].ticket) == {"stem": [1, 0], "a": [1, 1, 1], "b": [1, 0]}
    # a reads one channel of two: 2, 4 and 10 a weight
    assert bits(levels[2].ticket) == {"stem": [1, 0], "a": [0, 1, 1], "b": [1, 0]}


def test_filters_that_go_alone_only():
    levels = levels_of(Small(), sparsities=[1 / 3, 2 / 3], coupled=False)
    assert [bits(level.ticket) for level in levels] == [{"a": [1, 1, 1]}, {"a": [0, 1, 1]}, {"a": [0, 0, 1]}]


def test_what_pairs_cannot_make_is_the_nearest_count_the_larger_of_two():
    levels = levels_of(Pairs(), rounds=3, rate=0.2)
    # 8, round(6.4) = 6, round(4.8) = 5 lies between 4 and 6, round(4.0) = 4
    assert [count(level.ticket) for level in levels] == [8, 6, 6, 4]
    assert bits(levels[3].ticket) == {"stem": [0, 0, 1, 1], "b": [0, 0, 1, 1]}


def test_a_spared_layer_spares_what_is_added_to_it():
    levels = levels_of(Small(), rate=0.5, rounds=1, spare=["b"])
    assert [bits(level.ticket) for level in levels] == [{"a": [1, 1, 1]}, {"a": [0, 1, 1]}]  # round(1.5) = 2
    with pytest.raises(ValueError, match="Pairs has no filter that can be removed"):
        pst.imp(Pairs(), granularity="filter", rounds=1, spare=["stem.weight"])


def test_one_round_takes_the_filters_that_pruning_at_the_same_weights_takes():
    model = resnet(8)
    weights = copy.deepcopy(model)
    levels = levels_of(model, sparsities=[0.4])
    removed = 336 - count(levels[1].ticket)
    assert removed == 336 - round(0.6 * 336)
    known = pst.at_init(weights, score="magnitude", granularity="filter", remove=removed)
    assert bits(levels[1].ticket) == bits(known)


def test_shuffled_scores_keep_the_counts_of_each_group():
    plain, mixed = (
        levels_of(resnet(8), rate=0.4, rounds=1, control=control)[1].ticket for control in (None, "shuffle")
    )
    assert count(plain) == count(mixed) and bits(plain) != bits(mixed)
    assert {n: sum(b) for n, b in bits(plain).items()} == {n: sum(b) for n, b in bits(mixed).items()}


def test_rounds_train_compactly_with_momentum_and_rewind():
    model = resnet(8)
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    search = pst.imp(model, optimizer, granularity="filter", rounds=2, rate=0.3)
    sizes = []
    for level in search:
        sizes.append(sum(p.numel() for g in optimizer.param_groups for p in g["params"]))
        for step in range(level.start, 3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            level.step_done(step + 1)
    assert sizes[0] > sizes[1] > sizes[2] and all(torch.equal(t, first[n]) for n, t in search.ticket.rewind.items())
    # the compact network is the dense one whose removed channels are zeros
    pst.densify(model)
    masks = search.pieces.weight_masks(search.ticket)
    state = model.state_dict()
    assert all(not state[name][~mask].any() for name, mask in masks.items())
    compact = pst.sparsify(copy.deepcopy(model), search.ticket).eval()
    assert torch.allclose(compact(x), model.eval()(x), rtol=1e-4, atol=1e-5)
