import pytest
import torch
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.search.controls import random_mask, reinitialise, shuffle_masks


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = nn.Linear(40, 30)

    def forward(self, x):
        return self.scale * self.layer(x)


@pytest.fixture
def ticket():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    with torch.no_grad():
        model[2].weight.mul_(3)  # so that the layers' sparsities differ
    return model, pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.8)


def counts(ticket):
    return {name: int(mask.sum()) for name, mask in ticket.masks.items()}


def test_shuffled_masks_keep_each_layers_count_and_little_else(ticket):
    _, ticket = ticket
    other = shuffle_masks(ticket, seed=1)
    assert counts(other) == counts(ticket) and other.rewind is ticket.rewind
    shared = pst.overlap(other, ticket)
    # by chance alike: the standard deviation of the hypergeometric count of 300 kept weights is below 9, 3% of them
    assert abs(shared["overlap"] - shared["chance"]) < 0.12
    again, third = shuffle_masks(ticket, seed=1), shuffle_masks(ticket, seed=2)
    assert all(torch.equal(again.masks[n], m) for n, m in other.masks.items())
    assert not all(torch.equal(third.masks[n], m) for n, m in other.masks.items())


def test_random_masks_keep_the_overall_count_alone(ticket):
    _, ticket = ticket
    other = random_mask(ticket, seed=1)
    assert sum(counts(other).values()) == sum(counts(ticket).values()) == 300
    # 1200 and 300 weights at one density of a fifth: 240 and 60, with standard deviations below 7
    assert abs(counts(other)["0.weight"] - 240) < 35 and counts(ticket)["0.weight"] < 200


def test_controls_move_no_random_state_and_name_themselves(ticket):
    model, ticket = ticket
    before = torch.get_rng_state()
    made = [shuffle_masks(ticket, 3), random_mask(ticket, 3), reinitialise(ticket, model, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [t.provenance["control"] for t in made] == ["shuffle", "random", "reinit"]
    assert "control" not in ticket.provenance and all(t.provenance["control seed"] == 3 for t in made)


def test_reinitialised_weights_are_fresh_draws_below_the_same_mask(ticket):
    model, ticket = ticket
    first = {n: t.clone() for n, t in model.state_dict().items()}
    other = reinitialise(ticket, model, seed=5)
    assert all(torch.equal(other.masks[n], m) for n, m in ticket.masks.items())
    assert all(torch.equal(t, first[n]) for n, t in model.state_dict().items())
    torch.manual_seed(5)
    drawn = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10)).state_dict()
    assert all(torch.equal(other.rewind[n], t) for n, t in drawn.items())
    halves = reinitialise(ticket, model, init=lambda m: [nn.init.constant_(p, 0.5) for p in m.parameters()])
    assert all((t == 0.5).all() for t in halves.rewind.values())


def test_filters_are_shuffled_within_their_convolution():
    model = resnet(8)
    ticket = pst.at_init(model, batch(), score="magnitude", granularity="filter", remove=50)
    other = shuffle_masks(ticket)
    assert {n: int(k.sum()) for n, k in other.filters.items()} == {n: int(k.sum()) for n, k in ticket.filters.items()}
    assert any(not torch.equal(k, ticket.filters[n]) for n, k in other.filters.items())


def test_bad_input_gets_one_sentence(ticket):
    model, _ = ticket
    layers = pst.at_init(resnet(20), batch(), score="random", granularity="layer", remove=1)
    with pytest.raises(pst.TicketError, match="nothing within a layer to permute"):
        shuffle_masks(layers)
    with pytest.raises(pst.TicketError, match="only a ticket of masks"):
        random_mask(layers)
    with pytest.raises(pst.TicketError, match="another architecture"):
        reinitialise(layers, model)
    foreign = Scaled()
    own = pst.at_init(foreign, score="magnitude", granularity="weight", sparsity=0.5)
    with pytest.raises(ValueError, match="the model, a Scaled, has parameters and no reset_parameters"):
        reinitialise(own, foreign)
