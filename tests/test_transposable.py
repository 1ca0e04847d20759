"""Transposable n:m masks."""

import itertools

import pytest
import torch
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.ops.semi_structured import is_transposable
from pysparse_ticket.transposable import _patterns, keep_transposable


def scores(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m", "count"), [(1, 2, 2), (1, 4, 24), (2, 4, 90), (3, 4, 24), (4, 4, 1), (1, 3, 6)])
def test_patterns_are_counted(n, m, count):
    found = _patterns(n, m)
    assert found.shape == (count, m, m) and len({tuple(p.flatten().tolist()) for p in found}) == count
    assert (found.sum(1) == n).all() and (found.sum(2) == n).all()


def test_a_block_by_hand():
    score = torch.tensor([[9.0, 1, 7, 4], [1, 2, 3, 0], [8, 3, 5, 4], [1, 2, 6, 2]])
    # 9 and 8 fill column 0, 7 row 0. With row 2's 4 and row 1's 2 and 3 the last row's 2 and 2 come to 37; giving
    # column 2 to the last row instead makes 9 + 7 + 2 + 0 + 8 + 4 + 2 + 6 = 38
    assert keep_transposable(score).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]


def test_greedy_would_do_worse():
    # taking 10 and 9 and 9 first leaves the last row and column to what is negative
    score = torch.tensor([[10.0, 9, 0, 0], [9, 8, 0, 0], [0, 0, -5, 7], [0, 0, 7, -9]])
    kept = keep_transposable(score)
    assert float(score[kept].sum()) == best_sum(score)


def best_sum(block):
    """The best of 2:4 by trying all 16 x 16 x 16 x 16 choices of rows."""
    rows = list(itertools.combinations(range(4), 2))
    best = -float("inf")
    for chosen in itertools.product(rows, repeat=4):
        if all(sum(c in row for row in chosen) == 2 for c in range(4)):
            best = max(best, sum(float(block[r, c]) for r, row in enumerate(chosen) for c in row))
    return best


def test_every_block_is_the_best_one():
    score = torch.randint(-9, 10, (12, 8), generator=torch.Generator().manual_seed(1)).double()
    mask = keep_transposable(score)
    for r, c in itertools.product(range(0, 12, 4), range(0, 8, 4)):
        block, kept = score[r : r + 4, c : c + 4], mask[r : r + 4, c : c + 4]
        assert (kept.sum(0) == 2).all() and (kept.sum(1) == 2).all()
        assert float(block[kept].sum()) == best_sum(block)


def test_ties_keep_the_earlier_columns_in_the_earlier_rows():
    assert keep_transposable(torch.ones(4, 4)).int().tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2


def test_what_is_gone_stays_gone():
    first = keep_transposable(scores(16, 16), 3)
    second = keep_transposable(scores(16, 16, seed=2).masked_fill(~first, -torch.inf), 2)
    assert not (second & ~first).any() and is_transposable(second) and second.float().mean() == 0.5


@pytest.mark.parametrize(
    ("shape", "count"), [((4, 6), 12), ((1, 4), 2), ((3, 3), 5), ((2, 2), 4), ((3, 4), 6), ((1, 1), 1), ((7, 9), 32)]
)
def test_ragged_edges(shape, count):
    mask = keep_transposable(-scores(*shape))  # scores below zero are no reason to keep less
    assert int(mask.sum()) == count and is_transposable(mask) and mask.shape == shape


def test_a_convolution_is_a_matrix_of_filters():
    score = scores(8, 3, 3, 3)
    mask = keep_transposable(score)
    assert torch.equal(mask.flatten(1), keep_transposable(score.flatten(1))) and mask.shape == score.shape


def test_many_blocks_are_cut_in_chunks(monkeypatch):
    score = scores(40, 40)
    whole = keep_transposable(score)
    monkeypatch.setattr("pysparse_ticket.transposable.CHUNK", 7)
    assert torch.equal(keep_transposable(score), whole)


def test_is_transposable():
    mask = torch.zeros(4, 8, dtype=torch.bool)
    assert is_transposable(mask)
    mask[:2, 3] = mask[0, 1] = True
    assert is_transposable(mask)
    mask[2, 3] = True  # three in a column
    assert not is_transposable(mask) and not is_transposable(mask.T)
    assert is_transposable(mask, 3) and is_transposable(torch.zeros(0, 4, dtype=torch.bool))


def test_errors():
    with pytest.raises(ValueError, match="transposable n:m takes m up to 4, not 8"):
        keep_transposable(scores(8, 8), 4, 8)
    with pytest.raises(ValueError, match="n:m keeps n of m weights, 0 < n <= m, not 5:4"):
        keep_transposable(scores(8, 8), 5, 4)
    with pytest.raises(ValueError, match="m up to 4"):
        pst.at_init(nn.Linear(8, 8), score="magnitude", granularity="2:8t")


@pytest.mark.parametrize("steps", [1, 2])
def test_tickets_at_init(steps):
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    ticket = pst.at_init(model, score="magnitude", granularity="2:4t", steps=steps)
    assert ticket.provenance["granularity"] == "2:4t" and ticket.sparsity == 0.5
    for name, mask in ticket.masks.items():
        assert is_transposable(mask)
        if steps == 1:
            assert torch.equal(mask, keep_transposable(model.get_parameter(name).abs()))
    with pytest.raises(ValueError, match="granularity '2:4t' takes neither"):
        pst.at_init(model, score="magnitude", granularity="2:4t", sparsity=0.5)


def test_iterated_tickets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    for level in pst.imp(model, optimizer, granularity="2:4t"):
        kept.append(1 - level.ticket.sparsity)
        assert all(is_transposable(mask, 4 - len(kept) + 1) for mask in level.ticket.masks.values())
    assert kept == [1, 0.75, 0.5]
