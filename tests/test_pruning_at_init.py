"""Weights pruned at initialisation: the schedule's counts, the state that is scored, and what peers got wrong."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from nets import batch, resnet
from torch import nn
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket.cli import app
from pysparse_ticket.scores import SCORES, grasp, grasp_magnitude, prunable, snip, snip_scaled, synflow
from pysparse_ticket.structure import filter_chains


def mlp(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def labelled(width, classes, n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, width, generator=generator), torch.arange(n) % classes


def kept(ticket):
    return sum(int(m.sum()) for m in ticket.masks.values())


def recording(monkeypatch, name="snip"):
    """Put a spy in the place of a score: the non-zeros of every model that it is given."""
    seen, real = [], SCORES[name]

    def spy(model, batches, **options):
        seen.append({n: w.detach() != 0 for n, w in prunable(model).items()})
        return real(model, batches, **options)

    monkeypatch.setitem(SCORES, name, spy)
    return seen


def test_steps_follow_the_exponential_schedule(monkeypatch):
    # 8 x 8 weights to 1 / 16 in 4 steps: 64 * (1/16)^(e/4) = 32, 16, 8, 4; a linear schedule would hold 49, 34, 19, 4
    seen = recording(monkeypatch)
    net = mlp(8, 8)
    ticket = pst.at_init(net, labelled(8, 8), score="snip", granularity="weight", sparsity=15 / 16, steps=4)
    assert [int(s["0.weight"].sum()) for s in seen] + [kept(ticket)] == [64, 32, 16, 8, 4]
    for before, after in zip(seen, [*seen[1:], ticket.masks], strict=True):
        assert not (after["0.weight"] & ~before["0.weight"]).any()  # nothing comes back


def test_what_is_pruned_stays_pruned_whatever_it_scores_later(monkeypatch):
    # the second scoring prefers exactly what the first one cut: positions 0 to 3 of 8
    calls = iter([torch.arange(8.0), torch.arange(8.0).flip(0)])
    monkeypatch.setitem(SCORES, "magnitude", lambda model, batches, **_: {"0.weight": next(calls).view(4, 2).double()})
    ticket = pst.at_init(mlp(2, 4), score="magnitude", granularity="weight", sparsity=0.75, steps=2)
    assert ticket.masks["0.weight"].flatten().tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_steps_in_each_layer_and_for_tiles_and_groups(monkeypatch):
    seen = recording(monkeypatch, "magnitude")
    net = mlp(8, 8, 4)
    find = {"score": "magnitude", "steps": 2}
    ticket = pst.at_init(net, **find, granularity="weight", sparsity=0.75, scope="layer")
    assert [int(m.sum()) for m in seen[1].values()] == [32, 16]  # 64 and 32 weights by 1/4^(1/2)
    assert [int(m.sum()) for m in ticket.masks.values()] == [16, 8]
    ticket = pst.at_init(net, **find, granularity="block:2x2", sparsity=0.75)
    assert sum(int(m.sum()) for m in seen[3].values()) == 48 and kept(ticket) == 24  # 24 tiles: 12, then 6
    ticket = pst.at_init(net, **find, granularity="1:4")
    assert sum(int(m.sum()) for m in seen[5].values()) == 48  # 4 * (1/4)^(1/2) = 2 of 4
    assert all((m.reshape(-1, 4).sum(1) == 1).all() for m in ticket.masks.values())


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_counts_are_exact_in_one_step_and_in_three(score, scope):
    net = mlp(9, 8, 5)
    find = {"score": score, "granularity": "weight", "sparsity": 0.7, "scope": scope, "allow_empty": True}
    for steps in (1, 3):
        ticket = pst.at_init(net, labelled(9, 5), **find, steps=steps)
        assert kept(ticket) == 34  # 0.3 of 112 is 33.6; of 72 and 40 it is 21.6 and 12.0


def test_ties_are_cut_exactly_and_the_earlier_weights_stay():
    net = mlp(101, 1)
    nn.init.constant_(net[0].weight, -0.5)
    for steps in (1, 5):
        mask = pst.at_init(net, score="magnitude", granularity="weight", sparsity=0.2, steps=steps).masks["0.weight"]
        assert mask.flatten().tolist() == [True] * 81 + [False] * 20  # 0.8 * 101 = 80.8


def test_magnitude_and_random_do_not_change_with_steps():
    # scores that do not depend on the other weights: any number of steps ends with the same mask
    net = mlp(16, 12, 4)
    for score in ("magnitude", "random"):
        once, often = (
            pst.at_init(net, score=score, granularity="weight", sparsity=0.83, steps=steps) for steps in (1, 7)
        )
        assert all(torch.equal(once.masks[n], m) for n, m in often.masks.items())


def test_the_given_state_is_scored_and_stored_and_the_model_left_alone():
    net, later = mlp(6, 5, 3, seed=0), mlp(6, 5, 3, seed=7)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    state = {n: t.clone() for n, t in later.state_dict().items()}
    find = {"score": "snip", "granularity": "weight", "sparsity": 0.6, "steps": 2}
    ticket = pst.at_init(net, labelled(6, 3), **find, state=state)
    twin = pst.at_init(later, labelled(6, 3), **find)
    assert all(torch.equal(ticket.masks[n], m) for n, m in twin.masks.items())
    assert all(torch.equal(ticket.rewind[n], t) for n, t in state.items())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert ticket.provenance["state"] == "given" and twin.provenance["state"] == "model"
    state["0.weight"].zero_()  # stored by copy
    assert ticket.rewind["0.weight"].any()


def test_the_given_state_brings_its_batch_norm():
    net = resnet(20)
    later = resnet(20)
    for module in later.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.1, 3.0)
    find = {"score": "snip", "granularity": "weight", "sparsity": 0.9, "bn_mode": "eval", "rewind": False}
    a, b = (pst.at_init(m, batch(), **find, state=s) for m, s in ((net, later.state_dict()), (later, None)))
    c = pst.at_init(net, batch(), **find)
    assert all(torch.equal(a.masks[n], m) for n, m in b.masks.items()) and a.rewind is None
    assert any(not torch.equal(a.masks[n], m) for n, m in c.masks.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("2.bias"), r"another architecture: 2\.bias is missing in it and \[3\] in the model"),
        (lambda s: s.update({"4.weight": torch.ones(2)}), r"4\.weight is \[2\] in it and missing in the model"),
        (lambda s: s.update({"0.bias": torch.ones(2)}), r"0\.bias is \[2\] in it and \[5\] in the model"),
        (lambda s: s["0.weight"].fill_(torch.nan), r"0\.weight holds NaN"),
    ],
    ids=["missing", "foreign", "shape", "nan"],
)
def test_a_state_that_does_not_fit_is_refused(change, words):
    net = mlp(6, 5, 3)
    state = {n: t.clone() for n, t in net.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=words):
        pst.at_init(net, score="magnitude", granularity="weight", sparsity=0.5, state=state)
    assert not torch.isnan(net[0].weight).any()


def test_an_emptied_tensor_is_named_with_the_step():
    # magnitudes 1 to 4 in the first layer, 5 to 8 in the second: 8 * (1/4)^(1/2) = 4 are left after step 1
    net = mlp(2, 2, 2)
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 5).view(2, 2))
        net[2].weight.copy_(torch.arange(5.0, 9).view(2, 2))
    find = {"score": "magnitude", "granularity": "weight", "sparsity": 0.75}
    with pytest.raises(ValueError, match=r"would empty 0\.weight at step 1 of 2; lower it"):
        pst.at_init(net, **find, steps=2)
    with pytest.raises(ValueError, match=r"would empty 0\.weight; lower it"):
        pst.at_init(net, **find)
    ticket = pst.at_init(net, **find, steps=2, allow_empty=True)
    assert kept(ticket) == 2 and not ticket.masks["0.weight"].any()


def test_scaled_snip_judges_its_own_draw():
    net, data = mlp(6, 5, 3), labelled(6, 3)
    state = torch.get_rng_state()
    a, b, c = (snip_scaled(net, data, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["0.weight"], c["0.weight"])
    drawn = copy.deepcopy(net)  # the same as SNIP of a net that holds that draw: Xavier, layers in model order
    generator = torch.Generator().manual_seed(0)
    for weight in prunable(drawn).values():
        nn.init.xavier_normal_(weight, generator=generator)
    assert all(torch.equal(a[n], s) for n, s in snip(drawn, data).items())
    with torch.no_grad():  # whatever the model's own weights are
        net[0].weight.mul_(10).sub_(3)
    assert all(torch.equal(a[n], s) for n, s in snip_scaled(net, data).items())


def test_scaled_snip_draws_no_pruned_weight_back():
    # y = w1 x1 + w2 x2 with L = y^2 / 2 scores |w_i x_i (w1 x1 + w2 x2)|: without w1, |w2 x2|^2
    net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
    masks = {"weight": torch.tensor([[False, True]])}
    drawn = nn.init.xavier_normal_(torch.empty(1, 2), generator=torch.Generator().manual_seed(4))
    scores = snip_scaled(net, (x, None), loss=lambda y, _: y.square().sum() / 2, seed=4, masks=masks)["weight"]
    assert scores[0, 0] == 0 and scores[0, 1].item() == pytest.approx((2 * drawn[0, 1].item()) ** 2, rel=1e-6)


def test_grasp_removes_the_end_that_raises_the_gradient_norm_more():
    # shrinking weights by the share e moves |g|^2 by -2 e sum(theta Hg) over them, to first order (Wang et al. 2020)
    net, (x, y) = mlp(6, 8, 3).double(), labelled(6, 3)
    x = x.double()
    scores = grasp(net, (x, y), temperature=1.0)
    flat = torch.cat([s.flatten() for s in scores.values()])
    lowest = torch.zeros_like(flat, dtype=torch.bool)
    lowest[flat.argsort()[: flat.numel() // 2]] = True
    weights = list(prunable(net))

    def gradient_norm(shrunk, share=1e-6):
        twin = copy.deepcopy(net)
        parts = shrunk.split([scores[n].numel() for n in weights])
        with torch.no_grad():
            for name, part in zip(weights, parts, strict=True):
                weight = twin.get_parameter(name)
                weight.mul_(1 - share * part.double().view(weight.shape))
        grads = torch.autograd.grad(F.cross_entropy(twin(x), y), [twin.get_parameter(n) for n in weights])
        return sum(g.square().sum() for g in grads).item()

    start = gradient_norm(torch.zeros_like(flat))
    rise_removed, rise_kept = gradient_norm(lowest) - start, gradient_norm(~lowest) - start
    assert rise_removed > rise_kept
    for rise, pieces in ((rise_removed, lowest), (rise_kept, ~lowest)):  # second order terms are 1e-6 of it
        assert rise == pytest.approx(-2e-6 * flat[pieces].sum().item(), rel=1e-3)


def test_grasp_keeps_the_signed_top_and_its_magnitude_variant_another():
    net, data = mlp(12, 16, 4), labelled(12, 4)
    signed, unsigned = grasp(net, data), grasp_magnitude(net, data)
    assert all(torch.equal(unsigned[n], s.abs()) for n, s in signed.items())
    find = {"granularity": "weight", "sparsity": 0.5}
    ticket = pst.at_init(net, data, score="grasp", **find)
    left = torch.cat([signed[n][m] for n, m in ticket.masks.items()])
    gone = torch.cat([signed[n][~m] for n, m in ticket.masks.items()])
    assert left.min() >= gone.max() and kept(ticket) == round(0.5 * 256)  # k, not k + 1
    other = pst.at_init(net, data, score="grasp-magnitude", **find)
    assert any(not torch.equal(ticket.masks[n], m) for n, m in other.masks.items())


def test_dropout_neither_moves_the_generator_nor_makes_tickets_differ():
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    find = {"score": "snip", "granularity": "weight", "sparsity": 0.5}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a = pst.at_init(net, labelled(6, 3), **find)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    b = pst.at_init(net, labelled(6, 3), **find)
    assert all(torch.equal(a.masks[n], m) for n, m in b.masks.items())


def test_synflow_finds_filters_and_blocks_without_data():
    net = resnet(20)
    scores = synflow(net, in_shape=(3, 8, 8))
    ticket = pst.at_init(net, score="synflow", granularity="filter", remove=20, coupled=False, in_shape=(3, 8, 8))
    assert sum(int((~f).sum()) for f in ticket.filters.values()) == 20 and ticket.provenance["steps"] == 1
    pooled = {c.producer: scores[f"{c.producer}.weight"].sum((1, 2, 3)) for c in filter_chains(net)}
    gone = torch.cat([pooled[n][~f] for n, f in ticket.filters.items()])
    left = torch.cat([pooled[n][f] for n, f in ticket.filters.items()])
    assert gone.max() <= left.min()
    ticket = pst.at_init(net, score="synflow", granularity="layer", remove=1, in_shape=(3, 8, 8))
    worth = {b: sum(s.sum().item() for n, s in scores.items() if n.startswith(f"{b}.")) for b in ticket.layers}
    assert ticket.removed_blocks == [min(worth, key=worth.__getitem__)]


@pytest.mark.parametrize("score", ["magnitude", "synflow"])
def test_block_of_smallest_sum_goes_by_hand(score):
    # units of two 1 x 1 linear layers (a, b) around a shortcut: x (1 + a b)
    # magnitude: 1 + 1, 2 + 2, 1 + 2, 3 + 1 -> unit 2 is the least of 1, 2, 3 (4, 3, 4)
    # flow: all units (1 + 1)(1 + 4)(1 + 2)(1 + 3) = 120; unit i scores 2 R a b / (1 + a b): 192, 160, 180
    class Unit(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.first.weight, a)
            nn.init.constant_(self.second.weight, b)

        def forward(self, x):
            return x + self.second(self.first(x))

    net = nn.Sequential(Unit(1.0, -1.0), Unit(2.0, 2.0), Unit(-1.0, 2.0), Unit(3.0, 1.0))
    ticket = pst.at_init(net, score=score, granularity="layer", remove=1, in_shape=(1,))
    assert ticket.removed_blocks == ["2"]
    if score == "synflow":
        sums = [sum(synflow(net, in_shape=(1,))[f"{i}.{m}.weight"].item() for m in ("first", "second")) for i in (1, 2)]
        assert sums == [192.0, 160.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"scope": "erdos"}, "unknown scope 'erdos'; known: global, layer, erk"),
        ({"score": "snip"}, "needs data with labels"),
        ({"score": "synflow"}, "needs the shape of an input"),
        ({"granularity": "layer", "sparsity": None, "remove": 1, "steps": 3}, "goes in one shot"),
    ],
    ids=lambda v: "-".join(map(str, next(iter(v.items())))) if isinstance(v, dict) else "",
)
def test_bad_settings_get_one_sentence(options, words):
    settings = {"score": "magnitude", "granularity": "weight", "sparsity": 0.5} | options
    with pytest.raises(ValueError, match=words):
        pst.at_init(mlp(4, 4, 2), **settings)


def find(*words, code=0):
    words = [
        "find",
        *map(str, words),
        "--model",
        "mlp-2",
        "--size",
        "8",
        "--granularity",
        "weight",
        "--sparsity",
        "0.9",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code and "Traceback" not in result.output, result.output + repr(result.exception)
    return result


def test_the_command_finds_weight_tickets_at_a_stored_state(tmp_path):
    find(tmp_path / "a", "--score", "synflow", "--scope", "erk", "--steps", 3)
    find(tmp_path / "b", "--score", "magnitude", "--seed", 1, "--state", tmp_path / "a")
    a, b = pst.Ticket.load(tmp_path / "a"), pst.Ticket.load(tmp_path / "b")
    assert a.provenance["steps"] == 3 and a.provenance["scope"] == "erk" and b.provenance["state"] == "given"
    assert kept(a) == kept(b) == 14020  # 0.1 of 64 x 300 + 300 x 300 + 300 x 100 + 100 x 10
    assert all(torch.equal(t, b.rewind[n]) for n, t in a.rewind.items())


def test_the_command_says_what_is_wrong_with_a_state(tmp_path):
    pst.Ticket().save(tmp_path / "empty")
    for file, words in (("empty", "has no rewind state to score"), ("gone", "no ticket at")):
        result = find(tmp_path / "t", "--score", "magnitude", "--state", tmp_path / file, code=2)
        assert words in " ".join(result.stderr.split()) and not (tmp_path / "t").exists()
