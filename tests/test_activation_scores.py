"""Scores of the blocks of a trained network against values worked out by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from nets import batch, resnet
from torch import nn

from pysparse_ticket.scores import BLOCK_SCORES
from pysparse_ticket.scores.activation import bypassed, cka, cka_intra, expectabs, filter_l1, hrank, kl, pls
from pysparse_ticket.scores.similarity import linear_cka, pls_vip


class Apply(nn.Module):
    """A block that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def stack(*functions):
    return nn.Sequential(*map(Apply, functions))


# one sample of two 2 x 2 channels: the identity (rank 2) and all ones (rank 1)
MAPS = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]])
CORNER = torch.tensor([[1.0, 0.0], [0.0, 0.0]])


def test_hrank_is_the_mean_rank_over_the_side_after_relu():
    model = stack(lambda x: x, lambda x: x * CORNER, lambda x: -x)
    # (2 + 1) / 2 channels / side 2; (1 + 1) / 2 / 2; ReLU leaves nothing of a negative output
    assert hrank(model, MAPS, ["0", "1", "2"]) == {"0": 0.75, "1": 0.5, "2": 0.0}


def test_hrank_averages_samples_and_divides_by_the_longer_side():
    wide = stack(lambda x: x.repeat(1, 1, 1, 2))  # 2 x 4 maps of ranks 2 and 1
    assert hrank(wide, [(MAPS,), (MAPS * CORNER,)], ["0"]) == {"0": (2 / 4 + 1 / 4 + 1 / 4 + 1 / 4) / 4}
    assert hrank(stack(lambda x: x), MAPS[0], ["0"]) == {"0": 0.75}  # [N, h, w]: each sample is a map
    with pytest.raises(ValueError, match=r"hrank needs feature maps, block 0 returns \[4, 3\]"):
        hrank(stack(lambda x: x), torch.ones(4, 3), ["0"])


def test_hrank_counts_singular_values_at_the_precision_of_the_network():
    # singular values 1 and 1e-7: below 2 eps = 2.4e-7 of float32, above 4.4e-16 of float64
    near = torch.tensor([[[1.0, 0.0], [0.0, 1e-7]]])
    assert hrank(stack(lambda x: x), near, ["0"]) == {"0": 0.5}
    assert hrank(stack(lambda x: x), near.double(), ["0"]) == {"0": 1.0}


def test_expectabs_is_the_mean_activation_after_relu():
    model = stack(lambda x: x, lambda x: x * CORNER, lambda x: -x)
    # (2 + 4) / 8; (1 + 1) / 8; 0
    assert expectabs(model, MAPS, ["0", "1", "2"]) == {"0": 0.75, "1": 0.25, "2": 0.0}


def test_kl_of_a_block_that_lifts_one_logit():
    model = stack(lambda x: x + torch.tensor([math.log(3.0), 0.0]), lambda x: x + 1.0)
    zeros = torch.zeros(5, 2)
    # with block 0: p = (3/4, 1/4); without: q = (1/2, 1/2); sum q log(q/p) = log(2/3)/2 + log(2)/2. A shift is nothing.
    scores = kl(model, [(zeros[:2],), (zeros[2:],)], ["0", "1"])
    assert scores["0"] == pytest.approx((math.log(2 / 3) + math.log(2)) / 2, rel=1e-6)
    assert scores["1"] == pytest.approx(0.0, abs=1e-7)
    # twice: p = softmax(3/4, 1/4) = (1 / (1 + e^-1/2), 1 / (1 + e^1/2)), q = (1/2, 1/2)
    twice = kl(model, zeros, ["0"], double_softmax=True)["0"]
    p = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))
    assert twice == pytest.approx(-math.log(2) - (math.log(p[0]) + math.log(p[1])) / 2, rel=1e-6)


# one feature: CKA is the squared correlation. x = (0, 1, 2) centred is (-1, 0, 1), x + x^2 = (0, 2, 6) centred is
# (-8, -2, 10) / 3, so the square of their product is 6^2 = 36 and the norms' is 2 * 168 / 9: CKA = 27 / 28
LINE = torch.tensor([[0.0], [1.0], [2.0]])


def test_cka_compares_the_penultimate_features_with_those_without_the_block():
    model = nn.Sequential(Apply(lambda x: x + x**2), Apply(lambda x: 3 * x + 1), nn.Linear(1, 4))
    scores = cka(model, [(LINE[:2],), (LINE[2:],)], ["0", "1"])
    assert scores["0"] == pytest.approx(1 / 28, abs=1e-12) and scores["1"] == pytest.approx(0, abs=1e-12)
    # the head itself does not count: its input does. Without a head after the blocks the output is compared.
    assert cka(model[:2], LINE, ["0"])["0"] == pytest.approx(1 / 28, abs=1e-12)
    model = nn.Sequential(nn.Linear(1, 1), *model[:2])
    torch.nn.init.ones_(model[0].weight)
    torch.nn.init.zeros_(model[0].bias)
    assert cka(model, LINE, ["1"])["1"] == pytest.approx(1 / 28, abs=1e-12)
    # by name: the input of block 2 without block 1 is the line itself
    assert cka(model, LINE, ["1"], features="2")["1"] == pytest.approx(1 / 28, abs=1e-12)
    with pytest.raises(ValueError, match="no module 'fc'"):
        cka(model, LINE, ["1"], features="fc")


def test_cka_intra_compares_input_and_output():
    scores = cka_intra(stack(lambda x: x + x**2, lambda x: 3 * x + 1), [(LINE[:2],), (LINE[2:],)], ["0", "1"])
    assert scores["0"] == pytest.approx(1 / 28, abs=1e-12) and scores["1"] == pytest.approx(0, abs=1e-12)


def test_linear_cka_by_hand():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    # X'Y = (2, 0), X'X = 2 I, Y'Y = 2: 4 / (2 sqrt 2 * 2)
    assert linear_cka(x, y) == pytest.approx(1 / math.sqrt(2), rel=1e-12)
    wide = torch.cat([x, torch.zeros(4, 5)], 1)  # more features than samples: the products of samples are used
    assert linear_cka(wide + 7, y) == pytest.approx(1 / math.sqrt(2), rel=1e-12)
    turned = x @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert linear_cka(x, 5 * turned - 1) == pytest.approx(1, rel=1e-6)
    assert linear_cka(x, torch.ones(4, 3)) == 0
    with pytest.raises(ValueError, match="of 4 and 3"):
        linear_cka(x, y[:3])
    with pytest.raises(ValueError, match="second features hold NaN"):
        linear_cka(x, y * torch.nan)


# feature 0 is the class, feature 1 is orthogonal to it
CLASSES = torch.tensor([0, 0, 1, 1])
SPLIT = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def test_vip_by_hand():
    # X'Y has one row that is not zero, so w = (1, 0) and VIP = sqrt(2 (1, 0)); nothing is left for a second component
    for components in (1, 2):
        assert pls_vip(SPLIT, CLASSES, components).tolist() == pytest.approx([math.sqrt(2), 0], abs=1e-7)
    twins = SPLIT[:, [0, 0]] * torch.tensor([1.0, 9.0])  # standardised they are the same: w = (1, 1) / sqrt 2
    assert pls_vip(twins, CLASSES).tolist() == pytest.approx([1, 1], rel=1e-9)


def test_pls_score_is_the_mean_vip_of_a_block():
    model = stack(lambda x: x, lambda x: x[:, [0, 0]])
    scores = pls(model, [(SPLIT[:3], CLASSES[:3]), (SPLIT[3:], CLASSES[3:])], ["0", "1"])
    assert scores == pytest.approx({"0": math.sqrt(2) / 2, "1": 1.0}, rel=1e-7)
    # maps are averaged in windows of 8: these 16 x 8 pixels to SPLIT's two features
    image = torch.zeros(4, 1, 16, 8)
    image[:, 0, :8, :] = SPLIT[:, 0, None, None]
    image[:, 0, 8:, ::2], image[:, 0, 8:, 1::2] = SPLIT[:, 1, None, None] + 5, SPLIT[:, 1, None, None] - 5
    assert pls(stack(lambda x: x), (image, CLASSES), ["0"])["0"] == pytest.approx(math.sqrt(2) / 2, rel=1e-7)
    # a smaller map is averaged whole: one feature, whose VIP is 1
    assert pls(stack(lambda x: x), (image[..., 6:10, :4], CLASSES), ["0"])["0"] == pytest.approx(1, rel=1e-9)


# the formula over PLSRegression(n_components).fit(FEATURES, one_hot) of scikit-learn 1.9.1, iterated to convergence
FEATURES = [
    [0, 7, 6, 4, 2],
    [3, 5, 10, 4, 7],
    [1, 9, 9, 4, 7],
    [5, 5, 8, 4, 1],
    [4, 10, 8, 4, 2],
    [9, 10, 3, 4, 9],
    [9, 2, 9, 4, 10],
    [4, 3, 5, 4, 7],
    [5, 10, 7, 4, 10],
]
VIP = {
    1: [0.2440327342, 1.6667071905, 0.689476994, 0.0, 1.2989059398],
    2: [0.6569103422, 1.5706155048, 0.7869645541, 0.0, 1.2175066854],
    3: [0.652356649, 1.5662012476, 0.7828728774, 0.0, 1.2282322714],
}


@pytest.mark.parametrize("components", VIP)
def test_vip_equals_that_of_scikit_learn(components):
    found = pls_vip(torch.tensor(FEATURES), torch.arange(9) % 3, components)
    assert found.tolist() == pytest.approx(VIP[components], abs=1e-9)
    assert float(found.square().sum()) == pytest.approx(5, rel=1e-12)


def test_bypassing_a_block_is_zeroing_its_last_batch_norm():
    model, (x, _) = resnet(20), batch()
    model(x)  # running statistics away from 0 and 1
    model.eval()
    zeroed = copy.deepcopy(model)
    norm = zeroed.stage2[1].norm2
    torch.nn.init.zeros_(norm.weight), torch.nn.init.zeros_(norm.bias)
    with torch.no_grad():
        p, q = F.log_softmax(model(x).double(), 1), F.log_softmax(zeroed(x).double(), 1)
        with bypassed(model, ["stage2.1"]):
            assert torch.equal(model(x), zeroed(x))
        assert not torch.equal(model(x), zeroed(x))
    by_hand = float((q.exp() * (q - p)).sum() / len(x))
    assert kl(model, x, ["stage2.1"])["stage2.1"] == pytest.approx(by_hand, rel=1e-9) and by_hand > 0


def test_filter_l1():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)))
    with torch.no_grad():
        model[0][0].weight.copy_(torch.tensor([1.0, -3.0]).reshape(2, 1, 1, 1))
        model[0][1].weight.copy_(torch.tensor([2.0, -4.0]).reshape(1, 2, 1, 1))
    assert filter_l1(model, None, ["0"]) == {"0": (1 + 3) / 2 + (2 + 4)}


@pytest.mark.parametrize("name", BLOCK_SCORES)
def test_every_score_is_finite_and_leaves_the_model_and_the_generators_alone(name):
    model, data = resnet(14).train(), batch(16)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    blocks = ["stage1.1", "stage2.1", "stage3.1"]
    scores = BLOCK_SCORES[name](model, data, blocks)
    assert list(scores) == blocks and all(math.isfinite(v) for v in scores.values())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items()) and model.training
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("score", [hrank, expectabs, kl, pls, cka, cka_intra])
def test_trained_networks_are_scored_in_evaluation_mode(score):
    model, data = resnet(14), batch(16)
    model.train()(data[0])  # running statistics unlike the batch's
    blocks = ["stage1.1", "stage2.1"]
    assert score(model.train(), data, blocks) == score(model.eval(), data, blocks)


def test_a_block_without_any_branch_scores_zero():
    model, data = resnet(14).eval(), batch(16)
    torch.nn.init.zeros_(model.stage2[1].norm2.weight)  # its bias is 0 at the start
    for score in (kl, cka, cka_intra):
        scores = score(model, data, ["stage1.1", "stage2.1"])
        assert scores["stage2.1"] == pytest.approx(0, abs=1e-12) and scores["stage1.1"] > 1e-9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kl(stack(F.relu), None, ["0"]), "needs data"),
        (lambda: hrank(stack(F.relu), MAPS, ["stage9.1"]), "no block 'stage9.1'"),
        (lambda: expectabs(stack(F.relu), MAPS * torch.nan, ["0"]), "block 0 gives NaN"),
        (lambda: kl(stack(F.relu), MAPS, ["0"]), r"kl needs outputs \[samples, classes\]"),
        (lambda: pls(stack(F.relu), MAPS, ["0"]), "pls-vip needs labels"),
        (lambda: pls(stack(F.relu), (SPLIT, CLASSES * 0), ["0"]), "two classes or more"),
        (lambda: pls(stack(F.relu), (SPLIT * 0, CLASSES), ["0"]), "no feature that varies"),
        (lambda: pls(stack(F.relu), (SPLIT, CLASSES), ["0"], components=0), "1 component or more"),
    ],
)
def test_bad_input_gets_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
