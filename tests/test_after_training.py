"""Layer tickets of trained networks: what is dropped, in which order, and what they start from."""

import copy

import pytest
import torch
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.scores import BLOCK_SCORES


class Clamp(nn.Module):
    """min(x, 1) on the first logit, with a child that holds a weight, so that it counts as a block."""

    def __init__(self, raise_by=0.0):
        super().__init__()
        self.fc, self.raise_by = nn.Linear(1, 1), raise_by

    def forward(self, x):
        if self.raise_by:
            return x + torch.tensor([self.raise_by, 0.0])
        return torch.stack([x[:, 0].clamp(max=1), x[:, 1]], 1)


class Redundant(nn.Module):
    """Blocks 1 and 2 clamp alike, so either can go for nothing and both cannot; block 3 changes the logits a little."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Clamp(5.0), Clamp(), Clamp(), Clamp(0.5), Clamp())
        self.head = nn.Identity()

    def forward(self, x):
        return self.head(self.blocks(x))


def test_iterative_removal_sees_what_one_shot_cannot():
    # the first logit of x = 0: 5 after block 0, 1 after a clamp, 1.5 after block 3, 1 after the last clamp. Without one
    # of 1, 2 or 3 it still ends at 1; without 4 at 1.5. Of the ties the earliest goes.
    model, x = Redundant(), torch.zeros(2, 2)
    ticket = pst.after_training(model, x, score="kl", remove=1, keep=0)
    assert ticket.removed_blocks == ["blocks.1"] and ticket.provenance["scores"]["blocks.4"] > 0.01
    assert [ticket.provenance["scores"][f"blocks.{i}"] for i in (1, 2, 3)] == [0, 0, 0]

    # without the last clamp: 1 and 2 score 0, 3 scores KL(1.5 against 1) > 0, so one shot drops 1 and 2 and leaves 5.5
    model.blocks = model.blocks[:4]
    once = pst.after_training(model, x, score="kl", remove=2, keep=0)
    assert once.removed_blocks == ["blocks.1", "blocks.2"]
    # in two rounds: once 1 is gone, 2 scores KL(1.5 against 5.5), more than 3
    twice = pst.after_training(model, x, score="kl", remove=2, keep=0, steps=2)
    assert twice.provenance["order"] == ["blocks.1", "blocks.3"]
    assert twice.provenance["scores"]["blocks.2"] > twice.provenance["scores"]["blocks.3"] > 0
    assert not any("forward" in vars(m) for m in model.modules())


def test_the_block_that_does_nothing_goes_first():
    model = resnet(20)
    torch.nn.init.zeros_(model.stage2[2].norm2.weight)
    for score in ("kl", "cka", "cka-intra"):
        assert pst.after_training(model, batch(), score=score, remove=1).removed_blocks == ["stage2.2"]


@pytest.mark.parametrize("score", [*BLOCK_SCORES, "snip", "grasp", "magnitude", "synflow"])
def test_every_stage_keeps_two_blocks_whatever_the_score(score):
    model, data = resnet(20), batch(16)
    ticket = pst.after_training(model, data, score=score, remove=3, steps=2)
    assert [name.split(".")[0] for name in sorted(ticket.removed_blocks)] == ["stage1", "stage2", "stage3"]
    assert ticket.provenance["order"] and set(ticket.provenance["scores"]) == set(ticket.layers)
    with pytest.raises(ValueError, match="cannot remove 4 blocks: of 6 candidates 3 can go"):
        pst.after_training(model, data, score=score, remove=4)


def test_rounds_remove_the_whole_count():
    model = resnet(44)
    order = pst.after_training(model, batch(), score="filter-l1", remove=7, steps=3).provenance["order"]
    # 7 * 1 // 3 = 2, 7 * 2 // 3 = 4, 7: and weights do not depend on what else was removed, so rounds change nothing
    assert order == pst.after_training(model, batch(), score="filter-l1", remove=7).provenance["order"]
    drawn = pst.after_training(model, batch(), score="random", remove=7, steps=7, seed=3).removed_blocks
    assert drawn == pst.at_init(model, batch(), score="random", remove=7, seed=3).removed_blocks


def test_the_ticket_starts_from_the_early_epoch_by_copy(tmp_path):
    model, (x, y) = resnet(20), batch()

    def train(steps):
        for _ in range(steps):
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(model.parameters(), grads, strict=True):
                    parameter -= 0.1 * grad

    train(2)
    early = model.state_dict()  # by reference, as users do: trained on below
    theta = copy.deepcopy(early)
    ticket = pst.after_training(model, (x, y), score="hrank", remove=2, rewind=early)
    train(2)
    trained = copy.deepcopy(model.state_dict())
    assert all(torch.equal(t, theta[n]) for n, t in ticket.rewind.items())
    later = pst.after_training(model, (x, y), score="hrank", remove=2, rewind=theta)
    assert all(torch.equal(t, trained[n]) for n, t in model.state_dict().items())
    later.save(tmp_path / "t.safetensors")
    loaded = pst.Ticket.load(tmp_path / "t.safetensors", model)
    assert loaded.provenance == later.provenance and loaded.layers == later.layers
    assert all(torch.equal(t, theta[n]) for n, t in loaded.restore(model).state_dict().items())
    assert int(loaded.rewind["stem_norm.num_batches_tracked"]) == 2


def test_reinit_draws_other_weights_from_the_seed_or_the_function():
    model, data = resnet(20), batch()
    trained, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    settings = {"score": "expectabs", "remove": 2}
    a, b, c = (pst.after_training(model, data, **settings, reinit=True, seed=s).rewind for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a) and torch.equal(state, torch.get_rng_state())
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            assert not torch.equal(a[name], c[name]) and not torch.equal(a[name], trained[name])
    fresh = pst.after_training(model, data, **settings, reinit=lambda m: m.apply(_ones)).rewind
    assert all((t == 1).all() for n, t in fresh.items() if n.endswith("conv1.weight"))
    assert all(torch.equal(t, trained[n]) for n, t in model.state_dict().items())


def _ones(module):
    if isinstance(module, nn.Conv2d):
        nn.init.ones_(module.weight)


def test_weights_and_filters_of_a_trained_network():
    model, data = resnet(20), batch()
    theta = {n: t.clone() for n, t in model.state_dict().items()}
    ticket = pst.after_training(
        model, data, score="magnitude", granularity="weight", sparsity=0.9, rewind=theta, scope="layer"
    )
    assert all(torch.equal(t, theta[n]) for n, t in ticket.rewind.items())
    expected = pst.at_init(model, data, score="magnitude", granularity="weight", sparsity=0.9, scope="layer")
    assert all(torch.equal(m, expected.masks[n]) for n, m in ticket.masks.items())
    assert ticket.provenance["search"] == "after_training"
    filters = pst.after_training(model, data, score="snip", granularity="filter", remove=10)
    assert sum(int((~kept).sum()) for kept in filters.filters.values()) == 10 and filters.rewind is None


def test_dropout_while_scoring_leaves_the_generator_alone():
    model, data = resnet(20), batch()
    model.fc = nn.Sequential(nn.Dropout(), model.fc)
    state = torch.get_rng_state()
    a, b = (pst.after_training(model, data, score="snip", remove=1, bn_mode="train", seed=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()) and a.provenance["scores"] == b.provenance["scores"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "l3"}, "unknown score 'l3'; known: hrank, expectabs"),
        ({"remove": None}, "takes remove=, a count"),
        ({"remove": -1}, "0 or more"),
        ({"steps": 3}, "steps must lie between 1 and remove=2, not 3"),
        ({"granularity": "weight", "remove": None, "sparsity": 0.5}, "score 'hrank' is of blocks"),
        ({"granularity": "filter", "score": "snip", "steps": 2}, "steps"),
        ({"granularity": "filter", "score": "snip", "components": 2}, "takes no option 'components'"),
        ({"rewind": {"fc.weight": torch.zeros(10, 64)}}, "not of this network: it holds nothing under stem.weight"),
        ({"rewind": resnet(14).state_dict()}, "holds nothing under stage1.2.conv1.weight"),
        ({"rewind": resnet(32).state_dict()}, r"holds \[16, 16, 3, 3\] under stage1.3.conv1.weight, the model nothing"),
        ({"rewind": {}, "reinit": True}, "takes no rewind="),
        ({"score": "snip", "double_softmax": True}, "takes no option 'double_softmax'"),
    ],
)
def test_bad_settings_get_one_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        pst.after_training(resnet(20), batch(), **({"score": "hrank", "remove": 2} | options))


def test_a_parameter_that_nothing_draws_anew_is_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = resnet(20), nn.Parameter(torch.randn(10))

        def forward(self, x):
            return self.net(x) * self.scale

    with pytest.raises(ValueError, match="has parameters and no reset_parameters"):
        pst.after_training(Scaled(), batch(), remove=1, reinit=True)
