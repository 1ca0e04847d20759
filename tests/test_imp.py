"""Rounds of iterative magnitude pruning: what they keep, rewind and refuse."""

import math
from itertools import pairwise

import pytest
import torch
from imp_worker import STEPS, Net, Stop, search_of, setting, train
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.search.pieces import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def kept(ticket):
    return sum(int(mask.sum()) for mask in ticket.masks.values())


@pytest.fixture(scope="module")
def run():
    """One search over 4 rounds, and what each level started from."""
    model, optimizer, carry = setting()
    seen = []
    search = search_of(model, optimizer, carry, rounds=4)
    train(search, model, optimizer, carry, seen=seen)
    return model, search, seen


def test_rounds_of_a_fifth_keep_exactly_what_is_left(run):
    _, search, _ = run
    assert [kept(level.ticket) for level in search.levels] == [625, 500, 400, 320, 256]
    assert [level.index for level in search.levels] == [0, 1, 2, 3, 4] and search.ticket is search.levels[-1].ticket
    assert [level.start for level in search.levels] == [0, 2, 2, 2, 2]
    assert all(level.seconds > 0 for level in search.levels)
    assert [round(100 * level.sparsity, 2) for level in search.levels] == [0, 20, 36, 48.8, 59.04]


def test_sparsities_of_the_papers():
    # Chen et al. 2021 and Vandersmissen et al. 2023: 1 - 0.8^L, here of the 270,896 weights of ResNet-20
    counts = Schedule.of(25, 0.2, None).counts(270_896, "weights")
    percent = {1: 20.0, 2: 36.0, 3: 48.8, 4: 59.04, 5: 67.23, 6: 73.79, 7: 79.03, 8: 83.22, 9: 86.58, 10: 89.26}
    percent |= {11: 91.41, 12: 93.13, 13: 94.50, 14: 95.60, 15: 96.48, 16: 97.19, 17: 97.75, 18: 98.20, 20: 98.85}
    percent |= {24: 99.53, 25: 99.62}
    assert {level: round(100 * (1 - counts[level] / 270_896), 2) for level in percent} == percent
    # halves go to the even neighbour: 0.5 x 5 = 2.5 keeps 2, 0.5 x 7 = 3.5 keeps 4
    assert Schedule.of(1, 0.5, None).counts(5, "") == [5, 2] and Schedule.of(1, 0.5, None).counts(7, "") == [7, 4]
    assert Schedule.of(None, None, [0.5, 0.75]).counts(8, "") == [8, 4, 2]


def test_a_pruned_weight_never_comes_back(run):
    for before, after in pairwise(run[1].levels):
        assert all((after.ticket.masks[n] <= before.ticket.masks[n]).all() for n in before.ticket.masks)


def test_every_level_starts_from_the_rewind_state_bit_for_bit(run):
    _, search, seen = run
    rewind = search.ticket.rewind
    model, optimizer, carry = setting()  # the state at step 2, by a loop that knows no search
    again = search_of(model, optimizer, carry, rounds=4)
    with pytest.raises(Stop):
        train(again, model, optimizer, carry, stop=(0, 2))
    assert all(torch.equal(rewind[n], t) for n, t in model.state_dict().items())
    momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    for start in seen[1:]:
        masks = start["level"].ticket.masks
        for name, value in start["dense"].items():
            mask = masks.get(name)
            assert torch.equal(value, rewind[name] if mask is None else torch.where(mask, rewind[name], 0)), name
        for name, value in momentum.items():
            stem = name.removesuffix("weight")
            if name in masks and not masks[name].all():
                assert torch.equal(start["moments"][f"{stem}values momentum_buffer"], value[masks[name]])
            else:
                assert torch.equal(start["moments"][f"{name} momentum_buffer"], value)
        assert start["rate"] == 0.05 and start["position"] == 2  # 0.1 halved at step 2
        assert start["training"]  # which the loop had left off
        assert torch.equal(start["order"], carry[1].get_state()) and start["noise"] == carry[2].bit_generator.state
        assert torch.equal(start["draws"][0], torch.get_rng_state())


def test_scores_come_from_the_end_of_training_and_not_from_the_rewind_state():
    model, optimizer, carry = setting()
    search = search_of(model, optimizer, carry, rounds=1)
    ends = {}
    for level in search:
        if level.index == 0:
            for step in range(STEPS):
                level.step_done(step + 1)
            with torch.no_grad():
                for name in search.ticket.masks:
                    weight = model.get_parameter(name)
                    weight.copy_(torch.arange(1, weight.numel() + 1).reshape(weight.shape))
                    ends[name] = weight.clone()
    # magnitudes 1..500, 1..120 and 1..5: the 125 lowest are 1..60 and 1..60 of two tensors and the 5 of the third
    assert {n: int((~m).sum()) for n, m in search.ticket.masks.items()} == {
        "first.weight": 60,
        "last.weight": 60,
        "extra.weight": 5,
    }
    assert all((search.ticket.masks[n] == (ends[n] > 60)).all() for n in ends)


def test_later_rounds_train_packed_weights_alone(run):
    model, search, seen = run
    assert seen[0]["formats"] == [] and seen[0]["values"]["first.weight"] == (20, 25)
    for start in seen[1:]:
        masks = start["level"].ticket.masks
        assert start["formats"] == ["packed"] * sum(not mask.all() for mask in masks.values()) != []
        assert start["values"]["first.values"] == (int(masks["first.weight"].sum()),)
    pst.densify(model)
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in search.ticket.masks.items())


def test_adam_moments_and_step_counts_are_rewound():
    model, optimizer, carry = setting("adamw")
    seen = []
    train(search_of(model, optimizer, carry, rounds=1), model, optimizer, carry, seen=seen)
    assert seen[1]["moments"]["first.values step"] == 2
    mask = seen[1]["level"].ticket.masks["first.weight"]
    assert seen[1]["moments"]["first.values exp_avg_sq"].shape == (int(mask.sum()),)


def test_learning_rate_rewinding_keeps_the_trained_weights():
    model, optimizer, carry = setting()
    seen, ends = [], []
    search = search_of(model, optimizer, carry, rounds=2, mode="learning-rate")
    for level in search:
        seen.append({n: t.clone() for n, t in model.state_dict().items()})
        assert optimizer.param_groups[0]["lr"] == (0.05 if level.index else 0.1)
        assert not (level.index and optimizer.state)
        model.train()
        for step in range(level.start, STEPS):
            optimizer.zero_grad()
            model(torch.randn(8, 25)).square().mean().backward()
            optimizer.step()
            carry[0].step()
            level.step_done(step + 1)
        ends.append({n: t.clone() for n, t in model.state_dict().items()})
    for index in (1, 2):
        masks = search.levels[index].ticket.masks
        for name, value in seen[index].items():
            end = ends[index - 1][name]
            assert torch.equal(value, torch.where(masks[name], end, 0) if name in masks else end), name


def test_without_an_optimizer_each_level_has_its_own():
    model = Net()
    search = pst.imp(model, rounds=1, plan="packed")
    for _ in search:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.randn(4, 25)).square().mean().backward()
        optimizer.step()
    assert [kept(level.ticket) for level in search.levels] == [625, 500]


def one_round(model, sample=None, **options):
    """A search whose training does nothing, so that it prunes the first weights."""
    search = pst.imp(model, sample=sample, plan="packed", **options)
    for _ in search:
        pass
    return search


def linear(*rows):
    weight = torch.tensor(rows, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_n_of_m_goes_down_one_by_one():
    search = one_round(nn.Sequential(linear([1, 4, 2, 3, 9, 8], [-5, 0, 6, 1, 1, 2])), granularity="2:4")
    first, second = (level.ticket.masks["0.weight"].int().tolist() for level in search.levels[1:])
    assert first == [[0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]
    assert second == [[0, 1, 0, 1, 1, 1], [1, 0, 1, 0, 1, 1]]


def test_blocks_go_by_their_sum():
    # sums of the 1x2 blocks: 3, 7, 11, 2 | of four a half stays: 7 and 11
    search = one_round(nn.Sequential(linear([1, 2, 3, 4], [5, 6, 1, 1])), granularity="block:1x2", rounds=1, rate=0.5)
    assert search.ticket.masks["0.weight"].int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_layerwise_scope_prunes_each_tensor_by_itself():
    model = nn.Sequential(linear([1, 2], [3, 4]), linear([10, 20]))
    search = one_round(model, rounds=1, rate=0.5, scope="layer")
    assert [m.int().tolist() for m in search.ticket.masks.values()] == [[[0, 0], [1, 1]], [[0, 1]]]


def test_importance_decides_between_layers():
    layers = ([1.0, 2.0], [3.0, 4.0]), ([10.0, 30.0],)
    found = {}
    for name in ("magnitude", "l1", "lamp"):
        search = one_round(nn.Sequential(*(linear(*rows) for rows in layers)), rounds=1, rate=0.5, importance=name)
        found[name] = [m.int().reshape(-1).tolist() for m in search.ticket.masks.values()]
    assert found == {
        "magnitude": [[0, 0, 0, 1], [1, 1]],
        "l1": [[0, 0, 1, 1], [0, 1]],  # .1 .2 .3 .4 and .25 .75
        "lamp": [[0, 0, 1, 1], [0, 1]],  # 1/30 4/29 9/25 1 and 1/10 1
    }


def test_ties_keep_the_model_order():
    search = one_round(nn.Sequential(linear([1, -1, 1, 1])), rounds=1, rate=0.5)
    assert search.ticket.masks["0.weight"].int().tolist() == [[1, 1, 0, 0]]


def test_filters_go_by_exact_counts_and_the_next_round_counts_what_is_left():
    model = resnet(8)
    search = one_round(model, batch()[0], granularity="filter", rounds=2, rate=0.25)
    counts = [sum(int(k.sum()) for k in level.ticket.filters.values()) for level in search.levels]
    # 16 + 32 + 64 inner filters; the stem and conv2 of stage 1, conv2 and the shortcut of the others go in pairs
    assert counts == [112 + 2 * 112, 252, 189]
    for before, after in pairwise(search.levels):
        assert all((after.ticket.filters[n] <= before.ticket.filters[n]).all() for n in after.ticket.filters)
    assert {row.format for row in pst.plan(model).layers} == {"compact"}


def test_layers_go_one_a_round_at_least_and_come_back_for_the_rewind():
    model = resnet(20)
    names = list(model.state_dict())
    first = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    search = pst.imp(model, optimizer, granularity="layer", rounds=2, rate=0.1, sample=batch()[0])
    seen = []
    for level in search:
        seen.append(level.ticket.removed_blocks)
        assert isinstance(model.stage1[0], nn.Module)
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
    assert [len(s) for s in seen] == [0, 1, 2] and set(seen[1]) < set(seen[2])
    assert list(search.ticket.rewind) == names
    assert all(torch.equal(search.ticket.rewind[n], first[n]) for n in names)


def test_spared_layers_are_neither_pruned_nor_counted():
    search = one_round(Net(), rounds=1, spare=["last", "extra.weight"])
    assert list(search.ticket.masks) == ["first.weight"] and kept(search.ticket) == 400


@pytest.mark.parametrize("control", ["random", "shuffle", "reinit"])
def test_controls(control):
    torch.manual_seed(0)
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    first = {n: t.clone() for n, t in model.state_dict().items()}
    search = one_round(model, rounds=3, control=control, seed=4, importance="l1")
    honest = one_round(plain, rounds=3, importance="l1")
    assert [kept(level.ticket) for level in search.levels] == [625, 500, 400, 320]
    a, b = ({n: int(m.sum()) for n, m in s.levels[1].ticket.masks.items()} for s in (search, honest))
    same = all(torch.equal(m, honest.levels[1].ticket.masks[n]) for n, m in search.levels[1].ticket.masks.items())
    assert same == (control == "reinit")
    assert (a == b) == (control != "random")
    rewound = all(torch.equal(search.ticket.rewind[n], first[n]) for n in first)
    assert rewound == (control != "reinit")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance": "zscore"}, "unknown importance 'zscore'; known: magnitude, l1"),
        ({"mode": "late"}, "unknown mode 'late'"),
        ({"control": "none"}, "unknown control 'none'"),
        ({"granularity": "stage"}, "unknown granularity 'stage'"),
        ({"scope": "stage"}, "unknown scope 'stage'"),
        ({"aggregate": "max"}, "unknown aggregate 'max'"),
        ({"rate": 1.0}, "in \\(0, 1\\), not 1.0"),
        ({"rate": [0.5, 1.2]}, "in \\(0, 1\\), not 1.2"),
        ({"sparsities": [0.5, 1.0]}, "rise from above 0 to below 1"),
        ({"sparsities": [0.5, 0.4]}, "rise from above 0 to below 1"),
        ({"sparsities": [0.5], "rate": 0.2}, "not both"),
        ({"rounds": 3, "rate": [0.5]}, "1 values were given for 3 rounds"),
        ({"rounds": 0}, "rounds must be a whole number"),
        ({"rounds": 9, "rate": 0.7}, "round 7 of 9 would leave 0 of 625 weights"),
        ({"granularity": "2:4", "rate": 0.2}, "fixes its own schedule"),
        ({"granularity": "2:4", "rounds": 3}, "in 1 to 2 rounds, not 3"),
        ({"granularity": "layer"}, "pass sample="),
        ({"rewind_step": -1}, "rewind_step must be"),
        ({"spare": ["frist"]}, "'frist', which is no parameter or module"),
        ({"spare": ["first", "last", "extra"]}, "leaves no weight"),
        ({"control": "reinit", "mode": "learning-rate"}, "take one of the two"),
        ({"init": print}, "without that control leave it out"),
        ({"carry": [3]}, "carry= holds a int"),
        ({"facts": {"data": object()}}, "JSON cannot"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_settings_get_one_sentence(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        pst.imp(Net(), folder=tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


def test_layers_and_filters_that_run_out_are_refused_before_any_training():
    with pytest.raises(ValueError, match="round 4 of 4 would leave 2 of 6 removable blocks, and 3 must stay"):
        pst.imp(resnet(20), granularity="layer", sample=batch()[0], rounds=4)
    with pytest.raises(ValueError, match="would leave 0 of 112 removable filters, and 3 must stay"):
        pst.imp(resnet(8), granularity="filter", coupled=False, rounds=1, rate=0.999)
    with pytest.raises(ValueError, match="would leave 0 of 336 removable filters, and 9 must stay"):
        pst.imp(resnet(8), granularity="filter", rounds=1, rate=0.999)


def test_a_rewind_step_after_the_last_is_refused():
    model, optimizer, carry = setting()
    with pytest.raises(ValueError, match="level 0 ended after step 6 and so never came to the rewind step 7"):
        train(search_of(model, optimizer, carry, rewind_step=STEPS + 1), model, optimizer, carry)
    with pytest.raises(ValueError, match="level 0 never called step_done"):
        for _ in pst.imp(Net(), rewind_step=1):
            pass


def test_a_loop_that_ignores_the_start_is_told():
    model, optimizer, carry = setting()
    with pytest.raises(ValueError, match=r"step_done\(1\) came after step 2 of level 1"):
        for level in search_of(model, optimizer, carry):
            for step in range(STEPS):
                level.step_done(step + 1)


def test_nan_weights_are_refused_before_and_after_training():
    broken = Net()
    with torch.no_grad():
        broken.first.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"first\.weight holds NaN"):
        pst.imp(broken)
    model = Net()
    with pytest.raises(ValueError, match=r"last\.weight holds NaN after level 0"):
        for _ in pst.imp(model):
            with torch.no_grad():
                model.last.weight[0, 0] = math.nan


def test_a_sparse_model_or_a_lone_layer_or_a_foreign_parameter_is_refused():
    model = Net()
    pst.sparsify(model, pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.5))
    with pytest.raises(ValueError, match="densify it first"):
        pst.imp(model)
    with pytest.raises(ValueError, match=r"put it in an nn.Sequential"):
        pst.imp(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"holds a parameter of shape \(3, 3\)"):
        pst.imp(Net(), torch.optim.SGD(nn.Linear(3, 3).parameters(), 0.1))


def test_a_search_is_gone_through_once():
    search = one_round(Net(), rounds=1)
    with pytest.raises(RuntimeError, match="gone through already"):
        next(iter(search))
