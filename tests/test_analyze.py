"""The command ``pysparse-ticket analyze``: its figures against the library's and against hand-made states."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket import checkpoint as checkpoints
from pysparse_ticket.cli import app
from pysparse_ticket.evaluate import evaluate
from pysparse_ticket.models import build


def run(*words, code=0):
    result = CliRunner().invoke(app, ["analyze", *map(str, words)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split()), " ".join(result.stderr.split())


def resnet(depth):
    torch.manual_seed(0)
    return build(f"resnet{depth}", 10, (1, 8, 8))  # as the digits are


def random_ticket(path, seed, **more):
    ticket = pst.at_init(resnet(14), score="random", granularity="weight", sparsity=0.5, seed=seed)
    ticket.provenance |= more
    ticket.save(path)
    return ticket


def test_tickets_are_profiled_compared_and_followed(tmp_path):
    first = random_ticket(tmp_path / "a", 0, model="resnet14")
    second = random_ticket(tmp_path / "b", 1)
    second.masks["stage2.0.conv1.weight"][:] = False
    second.save(tmp_path / "b")
    out, _ = run("tickets", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["overlap"] == pst.overlap(first, second) and f"{report['overlap']['chance']:.2%}" in out
    for ticket, facts in zip((first, second), report["tickets"], strict=True):
        kept, total = (sum(row[key] for row in facts["layers"]) for key in ("kept", "total"))
        assert 1 - kept / total == pytest.approx(ticket.sparsity) and facts["sparsity"] == ticket.sparsity
    dead = [{r["layer"]: r["collapsed"] for r in t["layers"] if r["collapsed"]} for t in report["tickets"]]
    assert dead == [{}, {"stage2.0.conv1.weight": "empty"}] and "pass --model" in out
    run("tickets", tmp_path / "b", "--model", "resnet14", "--json", tmp_path / "r.json")
    (facts,) = json.loads((tmp_path / "r.json").read_text())["tickets"]
    assert {r["layer"]: r["collapsed"] for r in facts["layers"] if r["collapsed"]} == {
        "stage2.0.conv1.weight": "empty",
        "stage2.0.conv2.weight": "cut off from the input",
    }


def test_the_history_of_weights_by_hand(tmp_path):
    # signs of four weights over three states: one flips twice, one passes through zero and flips, two keep theirs
    states = [[1.0, -2.0, 3.0, 4.0], [-1.0, 0.0, 3.0, 4.0], [1.0, 2.0, 3.0, 0.0]]
    for i, row in enumerate(states):
        folder = tmp_path / "levels" / "abc" / f"level-{i:02d}"
        state = {"w": torch.tensor(row).reshape(2, 2), "bias": torch.ones(2)}
        checkpoints.save(folder / "trained.safetensors", state)
        checkpoints.save(tmp_path / f"{i}.checkpoint", {"step": 1, "model": state})
    for given in ([tmp_path / "levels"], [tmp_path / f"{i}.checkpoint" for i in range(3)]):
        run("weights", *given, "--json", tmp_path / "r.json")
        report = json.loads((tmp_path / "r.json").read_text())
        (row,) = report["layers"]
        assert len(report["states"]) == 3 and row["layer"] == "w" and row["flipped"] == 0.5
        # standard deviations sqrt(8)/3, sqrt(8/3), 0, sqrt(32)/3; travel 0, 4, 0, 4
        assert row["spread"] == pytest.approx((8**0.5 / 3 + (8 / 3) ** 0.5 + 32**0.5 / 3) / 4, rel=1e-12)
        assert row["travel"] == 2.0


def test_the_line_between_two_networks(tmp_path, few_digits):
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(build("resnet8", 10, (1, 8, 8)))
        checkpoints.save(tmp_path / str(seed), {"model": dict(networks[-1].state_dict())})
    words = ("connectivity", tmp_path / "0", tmp_path / "1", "--model", "resnet8", "--points", 3)
    out, _ = run(*words, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["alphas"] == [0, 0.5, 1] and "largest drop" in out
    values = report["averaged"]["accuracy"]
    assert [values[0], values[2]] == [evaluate(network, few_digits) for network in networks]
    assert report["averaged"]["max_drop"] == (values[0] + values[2]) / 2 - min(values)
    assert len(report["recalibrated"]["accuracy"]) == 3


@pytest.mark.usefixtures("few_digits")
def test_features_of_the_ticket_and_of_its_trained_network(tmp_path):
    model = resnet(20)
    pst.at_init(model, torch.ones(1, 1, 8, 8), score="magnitude", remove=1).save(tmp_path / "t")
    checkpoints.save(tmp_path / "dense", {"model": dict(model.state_dict())})
    gone = pst.Ticket.load(tmp_path / "t").removed_blocks
    twin = pst.sparsify(copy.deepcopy(model), pst.Ticket.load(tmp_path / "t"))
    checkpoints.save(tmp_path / "sparse", {"model": dict(twin.state_dict())})
    words = ("features", tmp_path / "t", "--model", "resnet20", "--samples", 32, "--dense", tmp_path / "dense")
    found = []
    for more in ((), ("--sparse", tmp_path / "sparse")):
        run(*words, *more, "--json", tmp_path / "r.json")
        found.append(json.loads((tmp_path / "r.json").read_text())["cka"])
    masked, trained = found
    assert masked.keys() == trained.keys() and not set(gone) & masked.keys()
    assert masked == pytest.approx(trained, rel=1e-5)  # the trained network is the masked one here
    assert masked["stage1.0"] == pytest.approx(1) and min(masked.values()) < 1 - 1e-6


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tickets", "a", "other"), "the tickets mask different tensors"),
        (("tickets", "absent"), "no ticket at"),
        (("tickets", "note"), "truncated or not a ticket"),
        (("tickets", "a", "--model", "resnet20"), "another architecture"),
        (("weights", "a"), "two steps or more, not of 1"),
        (("weights", "absent", "a"), "there is no file"),
        (("weights", "note", "a"), "neither a ticket nor a checkpoint"),
        (("weights", "empty", "a"), "holds no level of an iterated search"),
        (("weights", "bare", "a"), "no rewind state"),
        (("connectivity", "a", "other", "--model", "resnet14"), "the second state is not of this model"),
        (("connectivity", "a", "a", "--model", "resnet14", "--points", "1"), "two points or more"),
        (("features", "a", "--dense", "a"), "pass --model"),
        (("features", "a", "--dense", "other", "--model", "resnet14"), "weights of another network"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_gets_one_sentence_and_writes_nothing(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    random_ticket("a", 0)
    pst.at_init(resnet(20), score="random", granularity="weight", sparsity=0.5).save("other")
    pst.at_init(resnet(14), score="random", granularity="weight", sparsity=0.5, rewind=False).save("bare")
    (tmp_path / "note").write_text("not a file of ours")
    (tmp_path / "empty").mkdir()
    (tmp_path / "r.json").write_text("mine")
    out, err = run(*words, "--json", "r.json", code=2)
    assert message in err and "Traceback" not in out + err and (tmp_path / "r.json").read_text() == "mine"
