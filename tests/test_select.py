import pytest
import torch

from pysparse_ticket.granularity import (
    expand_blocks,
    keep_n_of_m,
    parse,
    pool_blocks,
    pool_layers,
    pool_units,
)
from pysparse_ticket.models import build
from pysparse_ticket.scores import magnitude
from pysparse_ticket.select import budget, drop_lowest_blocks, drop_lowest_units, erk_budgets, keep_top


def test_global_selection_is_exact_and_keeps_earlier_ties():
    scores = {"a": torch.tensor([3.0, 1.0, 1.0]), "b": torch.tensor([[1.0, 1.0, 4.0]])}
    masks = keep_top(scores, 0.5)
    assert masks["a"].tolist() == [True, True, False] and masks["b"].tolist() == [[False, False, True]]


def test_per_layer_selection_gives_every_layer_its_share():
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    masks = keep_top(scores, 0.5, scope="layer")
    assert masks["a"].tolist() == [True, True, False, False] and masks["b"].tolist() == [False, False, True, True]


def test_exact_count_where_float32_scores_tie():
    scores = {"w": torch.full((1001,), 1.0)}
    for sparsity in (0.0, 0.2, 0.488, 0.9, 0.999):
        assert int(keep_top(scores, sparsity)["w"].sum()) == round((1 - sparsity) * 1001)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        keep_top({"w": torch.ones(4)}, sparsity)


def test_nan_scores_and_emptied_layers_are_refused_by_name():
    with pytest.raises(ValueError, match="scores of b hold NaN"):
        keep_top({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}, 0.5)
    scores = {"a": torch.tensor([5.0, 6.0]), "b": torch.tensor([1.0, 2.0])}
    with pytest.raises(ValueError, match="would empty b"):
        keep_top(scores, 0.5, allow_empty=False)
    assert not keep_top(scores, 0.5)["b"].any()


def test_budget_on_the_way_is_exponential():
    assert [budget(0.99, 1000, e, 4) for e in (1, 2, 3, 4)] == [316, 100, 32, 10]  # 1000 * 10^(-e/2)
    assert budget(0.9, 270896, 100, 100) == budget(0.9, 270896) == 27090


def test_selection_equals_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 5, (1000,), generator=generator).double()
    score[::7] = -torch.inf
    for sparsity in (0.0, 0.3, 0.5, 0.77, 0.999):
        expected = torch.zeros(1000, dtype=torch.bool)
        expected[score.argsort(descending=True, stable=True)[: budget(sparsity, 1000)]] = True
        assert torch.equal(keep_top({"w": score}, sparsity)["w"], expected)


# a [4, 4]: 16 weights, ratio (4 + 4) / 16 = 0.5; b [2, 10]: 20, 0.6; c [20, 20]: 400, 0.1; ratio * n = 8, 12, 40
ERK = {"a": (4, 4), "b": (2, 10), "c": (20, 20)}


@pytest.mark.parametrize(
    ("total", "counts"),
    [
        (60, {"a": 8, "b": 12, "c": 40}),  # 60 / (8 + 12 + 40) = 1: the ratios themselves
        (9, {"a": 1, "b": 2, "c": 6}),  # 9 / 60: 1.2, 1.8, 6.0; the one left over goes to the largest remainder, b
        (109, {"a": 15, "b": 20, "c": 74}),  # b at 0.6 * 109 / 60 = 1.09 is dense; 89 / 48 leaves 14.83 and 74.17
        (118, {"a": 16, "b": 20, "c": 82}),  # b dense, then a at 0.5 * 98 / 48 = 1.02 too; c takes the other 82
        (436, {"a": 16, "b": 20, "c": 400}),
    ],
)
def test_erk_by_hand(total, counts):
    assert erk_budgets(ERK, 1 - total / 436) == counts
    masks = keep_top({n: torch.rand(s) for n, s in ERK.items()}, 1 - total / 436, scope="erk")
    assert {n: int(m.sum()) for n, m in masks.items()} == counts


def test_erk_of_convolutions_counts_the_kernel():
    # (8 + 4 + 3 + 3) / 288 * 288 = 18 and (8 + 8) / 64 * 64 = 16 of 34 shares; 34 of 352 weights are kept
    assert erk_budgets({"conv": (8, 4, 3, 3), "fc": (8, 8)}, 1 - 34 / 352) == {"conv": 18, "fc": 16}


def test_erk_shares_tiles_by_the_shape_of_the_weights():
    # 4 x 4 tiles of [16, 16] and [4, 16]: 16 and 4 of them; ratios 32 / 256 and 20 / 64 give shares 2 and 1.25
    # 10 tiles: b at 0.3125 * 10 / 3.25 = 0.96 keeps 3.85, a 6.15
    shapes = {"a": (16, 16), "b": (4, 16)}
    assert erk_budgets(shapes, 0.5, {"a": 16, "b": 4}) == {"a": 6, "b": 4}


def test_erk_gives_equal_remainders_to_the_earlier_tensors():
    # 4 of 11 weights by 2 : 5 : 5 are 2/3, 5/3 and 5/3; in floats the remainder of the first is the smallest
    assert erk_budgets({"a": (1, 1), "b": (4, 1), "c": (3, 2)}, 1 - 4 / 11) == {"a": 1, "b": 2, "c": 1}


def test_erk_of_a_resnet_20_is_exact():
    scores = magnitude(build("resnet20", 10, (3, 8, 8)))
    masks = keep_top(scores, 0.9, scope="erk")
    counts = {n: int(m.sum()) for n, m in masks.items()}
    assert sum(counts.values()) == 27090  # 0.1 * 270,896 = 27,089.6
    shares = {n: sum(s.shape) for n, s in scores.items()}
    # ratio * n is n_in + n_out + kh + kw: stem 25, stage 1 6 x 38, stage 2 54 + 5 x 70 + shortcut 50, stage 3
    # 102 + 5 x 134 + shortcut 98, fc 74
    assert sum(shares.values()) == 25 + 6 * 38 + 54 + 5 * 70 + 50 + 102 + 5 * 134 + 98 + 74 == 1651
    dense = {n for n, c in counts.items() if c == scores[n].numel()}
    # 27090 / 1651 = 16.4 gives the shortcut 820 of 512 and fc 1214 of 640; the stem's 25 * 17.0 stay below its 432
    assert dense == {"stage2.0.shortcut.0.weight", "fc.weight"}
    unit = (27090 - 512 - 640) / (1651 - 50 - 74)
    for name, count in counts.items():
        assert name in dense or abs(count - unit * shares[name]) < 1


def test_lowest_blocks_go_until_their_stage_would_keep_one():
    scores = {"1.1": 1.0, "1.2": 2.0, "2.1": 3.0, "2.2": 9.0}
    stages = {"1.1": "1", "1.2": "1", "2.1": "2", "2.2": "2"}
    sizes = {"1": 3, "2": 3}
    assert drop_lowest_blocks(scores, stages, sizes, 2) == ["1.1", "2.1"]
    with pytest.raises(ValueError, match="cannot remove 3 blocks: of 4 candidates 2 can go"):
        drop_lowest_blocks(scores, stages, sizes, 3)


def test_lowest_filters_go_but_one_stays():
    filters = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), [1] * 5, list("aabbb")
    assert drop_lowest_units(*filters, 2).tolist() == [False, True, False, True, True]
    with pytest.raises(ValueError, match="cannot remove 4 filters: of 5 candidates 3 can go"):
        drop_lowest_units(*filters, 4)


def test_pooling_by_hand():
    scores = {"s.0.w": torch.tensor([1.0, 2.0]), "s.0.v": torch.tensor([[3.0]]), "s.1.w": torch.tensor([8.0])}
    assert pool_layers(scores, ["s.0", "s.1"], "sum") == {"s.0": 6.0, "s.1": 8.0}
    assert pool_layers(scores, ["s.0", "s.1"], "mean") == {"s.0": 2.0, "s.1": 8.0}
    conv = {"c.weight": torch.arange(8.0).reshape(2, 2, 2, 1)}
    assert pool_units(conv, [[("c", 0)], [("c", 1)]], "sum").tolist() == [6.0, 22.0]
    assert pool_units(conv, [[("c", 0)], [("c", 1)]], "mean").tolist() == [1.5, 5.5]
    with pytest.raises(ValueError, match="known: sum, mean"):
        pool_layers(scores, ["s.0"], "median")


def test_block_tiles_pool_and_expand_with_ragged_edges():
    score = torch.arange(15.0).reshape(3, 5)
    assert pool_blocks(score, 2, 2, "sum").tolist() == [[12.0, 20.0, 13.0], [21.0, 25.0, 14.0]]
    assert pool_blocks(score, 2, 2, "mean").tolist() == [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    mask = expand_blocks(torch.tensor([[True, False, True], [False, True, False]]), (3, 5), 2, 2)
    assert mask.int().tolist() == [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 1, 1, 0]]


def test_n_of_m_keeps_n_in_every_group():
    score = torch.tensor([[1.0, 4.0, 3.0, 2.0, 7.0, 7.0, 7.0, 0.0, 5.0]])
    assert keep_n_of_m(score, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0, 1]]


def test_granularities_parse_or_are_refused():
    assert (
        parse("2:4") == ("n:m", (2, 4))
        and parse("2:4t") == ("n:mt", (2, 4))
        and parse("block:16x8") == ("block", (16, 8))
        and parse("layer") == ("layer", None)
    )
    for bad in ("5:4", "0:4", "block:0x8", "tile"):
        with pytest.raises(ValueError, match="unknown granularity"):
            parse(bad)
