"""A search that was killed and started again ends with the bits of one that ran through."""

import json
from itertools import pairwise

import pytest
import torch
from imp_worker import Net, Stop, search_of, setting, train
from nets import batch, resnet

import pysparse_ticket as pst
from pysparse_ticket import checkpoint
from pysparse_ticket.search.level_store import LevelStore
from pysparse_ticket.search.rewinding import capture, restore_carry, restore_model

pytestmark = pytest.mark.usefixtures("one_thread")


def ending(search, model, optimizer):
    """Every bit that a search leaves: weights, moments, masks and rewind states of all levels."""
    found = {f"model {n}": t.clone() for n, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        found |= {f"{name} {k}": torch.as_tensor(v).clone() for k, v in optimizer.state.get(p, {}).items()}
    for level in search.levels:
        for kind, tensors in (("mask", level.ticket.masks), ("rewind", level.ticket.rewind)):
            found |= {f"{kind} {level.index} {n}": t for n, t in tensors.items()}
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def run(kind, folder, stop=None, seen=None, **options):
    model, optimizer, carry = setting(kind)
    search = search_of(model, optimizer, carry, folder=folder, **options)
    train(search, model, optimizer, carry, stop=stop, seen=seen)
    return search, ending(search, model, optimizer)


@pytest.fixture(scope="module")
def through():
    """The ending of each search that nobody disturbs, without a folder."""
    found = {}
    for kind, mode in (("sgd", "weights"), ("adamw", "weights"), ("sgd", "learning-rate")):
        torch.set_num_threads(1)
        found[kind, mode] = run(kind, None, mode=mode)[1]
    return found


@pytest.mark.parametrize(
    "stops",
    [[(0, 1)], [(0, 4)], [(1, 2)], [(1, 5)], [(2, 3), (3, 2)], [(0, 0), (0, 5), (1, 3), (1, 4)]],
    ids=lambda stops: "-".join(f"{level}.{step}" for level, step in stops),
)
@pytest.mark.parametrize(("kind", "mode"), [("sgd", "weights"), ("adamw", "weights"), ("sgd", "learning-rate")])
def test_killed_inside_and_between_levels(kind, mode, stops, through, tmp_path):
    for stop in stops:
        with pytest.raises(Stop):
            run(kind, tmp_path, stop=stop, mode=mode)
    search, bits = run(kind, tmp_path, mode=mode)
    assert [level.index for level in search.done_levels] == list(range(stops[-1][0]))
    assert [level.index for level in search.levels] == [0, 1, 2, 3] and same(bits, through[kind, mode])


def test_killed_while_a_level_is_being_kept(through, tmp_path, monkeypatch):
    write = LevelStore._write

    def torn(self, index, record):
        if index == 1 and record["seconds"] is not None:
            raise Stop
        write(self, index, record)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(LevelStore, "_write", torn)
        run("sgd", tmp_path)
    search, bits = run("sgd", tmp_path)
    assert len(search.done_levels) == 1 and same(bits, through["sgd", "weights"])


def test_a_search_that_is_done_trains_nothing_and_leaves_the_trained_network(through, tmp_path):
    first, _ = run("sgd", tmp_path)
    seen = []
    search, bits = run("sgd", tmp_path, seen=seen)
    assert seen == [] and len(search.done_levels) == 4
    assert [a.seconds == b.seconds for a, b in zip(first.levels, search.levels, strict=True)] == [True] * 4
    model = {n: t for n, t in through["sgd", "weights"].items() if n.startswith(("model", "mask", "rewind"))}
    assert same({n: bits[n] for n in model}, model)


def test_carried_objects_come_back_from_a_file_as_they_were(tmp_path):
    model, optimizer, carry = setting()
    checkpoint.save(tmp_path / "state", capture(model, optimizer, carry, 0))
    milestones, drawn = carry[0].milestones, carry[2].random()
    carry[0].milestones = type(milestones)()
    restore_carry(carry, checkpoint.load(tmp_path / "state"))
    assert carry[0].milestones == milestones and type(carry[0].milestones) is type(milestones)
    assert carry[2].random() == drawn


def test_weights_come_back_in_the_memory_format_in_which_they_were_kept():
    model, last = resnet(8), resnet(8).to(memory_format=torch.channels_last)
    restore_model(model, capture(last, None, (), 0)["model"])
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(t, last.state_dict()[n]) for n, t in model.state_dict().items())


def test_more_rounds_go_on_where_fewer_ended(through, tmp_path):
    run("sgd", tmp_path, rounds=1)
    seen = []
    _, bits = run("sgd", tmp_path, rounds=3, seen=seen)
    assert [start["level"].index for start in seen] == [2, 3] and same(bits, through["sgd", "weights"])


def test_layers_filters_and_channels_last_resume_too(tmp_path):
    def go(granularity, folder, stop=None):
        model = resnet(20).train().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        x, y = batch()
        x = x.contiguous(memory_format=torch.channels_last)
        options = {"rounds": 2, "rate": 0.3, "plan": "dense" if granularity == "weight" else "auto", "sample": x}
        search = pst.imp(model, optimizer, granularity=granularity, folder=folder, **options)
        for level in search:
            for _ in range(2):
                if level.index == stop:
                    raise Stop
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        return {n: t.clone() for n, t in model.state_dict().items()} | {
            f"rewind {n}": t for n, t in search.ticket.rewind.items()
        }

    for granularity in ("layer", "filter", "weight"):
        whole = go(granularity, None)
        for stop in (1, 2):
            with pytest.raises(Stop):
                go(granularity, tmp_path / f"{granularity}{stop}", stop)
            assert same(go(granularity, tmp_path / f"{granularity}{stop}"), whole)


def test_the_kernels_of_an_interrupted_level_are_taken_again(tmp_path, monkeypatch):
    def go(stop):
        model, optimizer, carry = setting()
        options = {"rounds": 1, "rewind_step": 0, "sample": torch.zeros(12, 25), "folder": tmp_path}
        search = pst.imp(model, optimizer, carry=carry, **options)
        seen = []
        train(search, model, optimizer, carry, stop=stop, seen=seen)

    with pytest.raises(Stop):
        go((1, 3))
    (record,) = tmp_path.glob("*/level-01/level.json")
    chosen = json.loads(record.read_text())
    assert chosen["plan"].keys() <= {"first", "last", "extra"} and chosen["seconds"] is None
    other = {name: "packed" if fmt == "dense" else "dense" for name, fmt in chosen["plan"].items()}
    chosen["plan"] = other  # what a race would not choose
    record.write_text(json.dumps(chosen))
    model, optimizer, carry = setting()
    search = pst.imp(
        model, optimizer, carry=carry, rounds=1, rewind_step=0, sample=torch.zeros(12, 25), folder=tmp_path
    )
    for level in search:
        assert level.index == 1 and {row.layer: row.format for row in pst.plan(model).layers} == other != {}


def test_levels_lie_below_the_hash_with_readable_settings(tmp_path):
    search, _ = run("sgd", tmp_path, facts={"data": "digits"})
    (folder,) = tmp_path.iterdir()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["importance"] == "magnitude" and settings["rate"] == 0.2 and settings["data"] == "digits"
    assert settings["lr of optimizer group 0"] == 0.1 and settings["carry"] == ["MultiStepLR", "Generator", "Generator"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "level-00",
        "level-01",
        "level-02",
        "level-03",
        "rewind.safetensors",
        "settings.json",
        "start.safetensors",
    ]
    for level in search.levels:
        assert level.folder == folder / f"level-{level.index:02d}"
        stored = pst.Ticket.load(level.folder / "ticket.safetensors", Net())
        assert stored.provenance["level"] == level.index and stored.sparsity == level.sparsity
        assert all(torch.equal(m, level.ticket.masks[n]) for n, m in stored.masks.items())
    for before, after in pairwise(search.levels):
        assert before.ticket.sparsity < after.ticket.sparsity


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"importance": "l1"}, "its importance is 'magnitude', this one's 'l1'"),
        ({"rate": 0.5}, "its rate is 0.2, this one's 0.5"),
        ({"rewind_step": 3}, "its rewind_step is 2, this one's 3"),
        ({"mode": "learning-rate"}, "its mode is 'weights', this one's 'learning-rate'"),
        ({"facts": {"epochs": 7}}, "its epochs is 'absent', this one's 7"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_a_folder_with_other_settings_is_refused(change, words, tmp_path):
    with pytest.raises(Stop):
        run("sgd", tmp_path, stop=(1, 3))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"holds another search: {words}; give another folder"):
        run("sgd", tmp_path, **change)
    model, optimizer, carry = setting(seed=4)
    with pytest.raises(ValueError, match="its first weights is '"):
        search_of(model, optimizer, carry, folder=tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
