import pytest
import torch

from pysparse_ticket.granularity import (
    expand_blocks,
    keep_n_of_m,
    parse,
    pool_blocks,
    pool_filters,
    pool_layers,
)
from pysparse_ticket.select import drop_lowest_blocks, drop_lowest_filters, keep_top


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


def test_lowest_blocks_go_until_their_stage_would_keep_one():
    scores = {"1.1": 1.0, "1.2": 2.0, "2.1": 3.0, "2.2": 9.0}
    stages = {"1.1": "1", "1.2": "1", "2.1": "2", "2.2": "2"}
    sizes = {"1": 3, "2": 3}
    assert drop_lowest_blocks(scores, stages, sizes, 2) == ["1.1", "2.1"]
    with pytest.raises(ValueError, match="cannot remove 3 blocks: of 4 candidates 2 can go"):
        drop_lowest_blocks(scores, stages, sizes, 3)


def test_lowest_filters_go_but_one_stays():
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0, 5.0])}
    kept = drop_lowest_filters(scores, 2)
    assert kept["a"].tolist() == [False, True] and kept["b"].tolist() == [False, True, True]
    with pytest.raises(ValueError, match="cannot remove 4 filters: of 5 candidates 3 can go"):
        drop_lowest_filters(scores, 4)


def test_pooling_by_hand():
    scores = {"s.0.w": torch.tensor([1.0, 2.0]), "s.0.v": torch.tensor([[3.0]]), "s.1.w": torch.tensor([8.0])}
    assert pool_layers(scores, ["s.0", "s.1"], "sum") == {"s.0": 6.0, "s.1": 8.0}
    assert pool_layers(scores, ["s.0", "s.1"], "mean") == {"s.0": 2.0, "s.1": 8.0}
    conv = {"c.weight": torch.arange(8.0).reshape(2, 2, 2, 1)}
    assert pool_filters(conv, ["c"], "sum")["c"].tolist() == [6.0, 22.0]
    assert pool_filters(conv, ["c"], "mean")["c"].tolist() == [1.5, 5.5]
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
        and parse("block:16x8") == ("block", (16, 8))
        and parse("layer") == ("layer", None)
    )
    for bad in ("5:4", "0:4", "block:0x8", "tile"):
        with pytest.raises(ValueError, match="unknown granularity"):
            parse(bad)
