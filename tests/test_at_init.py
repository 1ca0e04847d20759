import pytest
import torch
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.structure import filter_chains, find_blocks


@pytest.mark.parametrize(("depth", "candidates", "most"), [(32, 12, 9), (56, 24, 21), (20, 6, 3)])
def test_candidates_are_those_of_the_paper(depth, candidates, most):
    model, (x, y) = resnet(depth), batch()
    blocks = find_blocks(model, x)
    assert len(blocks.candidates) == candidates
    assert not any(name.endswith(".0") for name in blocks.candidates)
    ticket = pst.at_init(model, (x, y), score="random", granularity="layer", remove=most)
    left = [name for name, kept in ticket.layers.items() if kept]
    assert [sum(name.startswith(stage) for name in left) for stage in ("stage1", "stage2", "stage3")] == [1, 1, 1]
    with pytest.raises(ValueError, match=f"cannot remove {most + 1} blocks: of {candidates} candidates {most} can go"):
        pst.at_init(model, (x, y), score="random", granularity="layer", remove=most + 1)


def test_strict_spares_the_neighbours_of_downsampling_blocks():
    names = find_blocks(resnet(32), batch()[0], strict=True).candidates
    assert names == ("stage1.1", "stage1.2", "stage1.3", "stage2.2", "stage2.3", "stage3.2", "stage3.3", "stage3.4")


def test_lowest_scored_blocks_are_the_ones_removed():
    model = resnet(20)
    with torch.no_grad():
        model.stage3[1].conv1.weight.zero_()
        model.stage3[1].conv2.weight.zero_()
    ticket = pst.at_init(model, batch(), score="magnitude", granularity="layer", remove=1)
    assert ticket.removed_blocks == ["stage3.1"]


def test_aggregate_decides_between_stages():
    # He-initialised magnitudes: sums grow with a block's size, means shrink with its fan-in
    picks = {
        how: pst.at_init(resnet(20), batch(), score="magnitude", granularity="layer", remove=1, aggregate=how)
        for how in ("sum", "mean")
    }
    assert picks["sum"].removed_blocks[0].startswith("stage1")
    assert picks["mean"].removed_blocks[0].startswith("stage3")


class Foreign(nn.Module):
    """A network that this package did not write: blocks in a ModuleList, a second argument, a shared helper."""

    class Unit(nn.Module):
        def __init__(self, width, out):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, out))
            self.same = width == out

        def forward(self, x, scale):
            return x + scale * self.body(x) if self.same else self.body(x)

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList(self.Unit(*w) for w in ((4, 4), (4, 4), (4, 4), (4, 4), (4, 6), (6, 6), (6, 6)))
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        for unit in self.units:
            x = unit(x, 0.5)
        return self.head(x)


def test_candidates_of_a_foreign_network_are_found_by_running_it():
    model, x = Foreign(), torch.randn(3, 4)
    blocks = find_blocks(model, x)
    assert blocks.candidates == ("units.1", "units.2", "units.3", "units.5", "units.6")
    assert blocks.stage_sizes == {"units.0": 4, "units.4": 3}
    ticket = pst.at_init(model, (x, torch.tensor([0, 1, 2])), score="snip", granularity="layer", remove=3)
    out = pst.sparsify(model, ticket)(x)
    assert out.shape == (3, 10)


def test_filter_ticket_has_the_exact_count_and_only_inner_filters():
    model = resnet(20)
    assert [c.producer for c in filter_chains(model)] == [f"stage{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)]
    ticket = pst.at_init(model, batch(), score="snip", granularity="filter", remove=100)
    assert sum(int((~kept).sum()) for kept in ticket.filters.values()) == 100


@pytest.mark.parametrize("score", ["magnitude", "random", "snip", "grasp", "grasp-signed"])
def test_weight_ticket_has_the_exact_count(score):
    ticket = pst.at_init(resnet(20), batch(), score=score, granularity="weight", sparsity=0.9)
    assert sum(int(m.sum()) for m in ticket.masks.values()) == round(0.1 * 270896)


def test_two_of_four_and_blocks():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    ticket = pst.at_init(model, score="magnitude", granularity="2:4")
    assert all((m.reshape(-1, 4).sum(1) == 2).all() for m in ticket.masks.values()) and ticket.sparsity == 0.5
    ticket = pst.at_init(model, score="magnitude", granularity="block:4x4", sparsity=0.5)
    tiles = torch.cat([m.reshape(-1, 4, 2, 4).transpose(1, 2).reshape(-1, 16) for m in ticket.masks.values()])
    assert (tiles.sum(1) == 16).sum() == 3 and (tiles.sum(1) == 0).sum() == 3


def test_finding_a_ticket_changes_nothing_in_the_model():
    model = resnet(20).train()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    pst.at_init(model, batch(), score="grasp", granularity="layer", remove=2)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items()) and model.training


def test_ticket_of_another_depth_is_refused(tmp_path):
    ticket = pst.at_init(resnet(20), batch(), score="random", granularity="layer", remove=1)
    ticket.save(tmp_path / "t.safetensors")
    with pytest.raises(pst.TicketError, match="for another architecture"):
        pst.sparsify(resnet(32), pst.Ticket.load(tmp_path / "t.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "l3"}, "unknown score 'l3'; known: magnitude"),
        ({"granularity": "stage"}, "unknown granularity 'stage'"),
        ({"granularity": "layer", "remove": None}, "takes remove=, a count"),
        ({"granularity": "weight", "remove": 3}, "takes sparsity="),
        ({"granularity": "weight", "remove": None, "sparsity": 1.0}, r"sparsity must lie in \[0, 1\)"),
        ({"remove": -1}, "remove must be 0 or more"),
        ({"aggregate": "median"}, "unknown aggregate 'median'"),
        ({"scope": "stage", "granularity": "weight", "remove": None, "sparsity": 0.5}, "unknown scope 'stage'"),
    ],
    ids=lambda v: next(iter(v.values())) if isinstance(v, dict) else "",
)
def test_bad_settings_get_one_sentence(options, words):
    settings = {"score": "magnitude", "granularity": "layer", "remove": 1} | options
    with pytest.raises(ValueError, match=words):
        pst.at_init(resnet(20), batch(), **settings)
