"""Values worked out by hand, of the weights 3, -4 and 0, 5 with the last one pruned: magnitudes 3, 4, 0."""

import math

import pytest
import torch
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.scores import IMPORTANCES, SCORES, layerwise

WEIGHT = torch.tensor([[3.0, -4.0], [0.0, 5.0]])
MASK = torch.tensor([[True, True], [True, False]])
SUM_EXP = math.exp(3) + math.exp(4) + 1
HAND = {
    "magnitude": [3, 4, 0],
    "l1": [3 / 7, 4 / 7, 0],
    "l2": [9 / 25, 16 / 25, 0],
    "softmax": [math.exp(3) / SUM_EXP, math.exp(4) / SUM_EXP, 1 / SUM_EXP],
    "minmax": [3 / 4, 1, 0],
    "lamp": [9 / (9 + 16), 1, 0],  # 16/16, 9/(16+9), 0/(16+9+0)
}


def scores(name, weight, mask=None):
    return layerwise(name, {"w": weight}, None if mask is None else {"w": mask})["w"]


@pytest.mark.parametrize("name", HAND)
def test_values_by_hand(name):
    got = scores(name, WEIGHT, MASK)
    assert got.dtype == torch.float64 and got[1, 1] == -math.inf
    # four operations on numbers that float64 holds exactly
    torch.testing.assert_close(got[MASK], torch.tensor(HAND[name], dtype=torch.float64), rtol=1e-15, atol=0)


def test_every_importance_of_the_paper_has_a_hand_value():
    assert HAND.keys() == IMPORTANCES.keys()


@pytest.mark.parametrize("name", IMPORTANCES)
def test_rises_with_magnitude_inside_a_layer(name):
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    order = weight.abs().reshape(-1).argsort()
    along = scores(name, weight).reshape(-1)[order]
    assert (along.diff() >= 0).all() and along[-1] > along[0]


@pytest.mark.parametrize(("name", "same"), [("l1", 1), ("l2", 1), ("minmax", 1), ("lamp", 1), ("magnitude", 0)])
def test_scale_of_a_layer(name, same):
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(2))
    # a power of two scales every rounding step with it
    assert torch.equal(scores(name, weight), scores(name, 8 * weight)) == bool(same)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_what_lies_under_the_mask_is_never_read(name):
    spoilt = WEIGHT.clone()
    spoilt[~MASK] = math.nan
    assert torch.equal(scores(name, spoilt, MASK), scores(name, WEIGHT, MASK))


def test_lamp_of_the_largest_weight_is_1_and_ties_keep_the_model_order():
    weight = torch.tensor([2.0, -2.0, 1.0, -2.0])
    # suffix sums in the order 2, -2, -2, 1: 4, 8, 12, 13
    assert scores("lamp", weight).tolist() == [1.0, 4 / 8, 1 / 13, 4 / 12]


@pytest.mark.parametrize("name", IMPORTANCES)
@pytest.mark.parametrize(("value", "count"), [(0.0, 3), (0.5, 3), (0.5, 1), (0.5, 0)])
def test_a_layer_of_equal_weights_has_finite_scores(name, value, count):
    mask = torch.arange(3) < count
    got = scores(name, torch.full((3,), value), mask)
    assert got[mask].isfinite().all() and (got[~mask] == -math.inf).all()


def test_minmax_takes_the_last_weight_of_a_layer_last():
    assert scores("minmax", torch.tensor([0.5])).item() == 1 and scores("minmax", torch.zeros(1)).item() == 0


@pytest.mark.parametrize("name", IMPORTANCES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_are_refused(name, bad):
    with pytest.raises(ValueError, match="w holds NaN or inf"):
        scores(name, torch.tensor([1.0, bad]))


def test_unknown_importance_names_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown importance 'zscore'; known: magnitude, l1, l2, softmax, minmax, lamp"
    ):
        scores("zscore", WEIGHT)


def test_at_init_takes_them_as_scores():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[10.0, 30.0]]))
    assert IMPORTANCES.keys() <= SCORES.keys()
    kept = {}
    for name in ("magnitude", "l1", "minmax", "lamp"):
        masks = pst.at_init(model, score=name, granularity="weight", sparsity=0.5).masks
        kept[name] = [masks["0.weight"].int().reshape(-1).tolist(), masks["1.weight"].int().reshape(-1).tolist()]
    assert kept["magnitude"] == [[0, 0, 0, 1], [1, 1]]
    assert kept["l1"] == [[0, 0, 1, 1], [0, 1]]  # .1 .2 .3 .4 and .25 .75
    assert kept["minmax"] == [[0, 0, 1, 1], [0, 1]]  # 0 1/3 2/3 1 and 0 1
    assert kept["lamp"] == [[0, 0, 1, 1], [0, 1]]  # 1/30 4/29 9/25 1 and 1/10 1
