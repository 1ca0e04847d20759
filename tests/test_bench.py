import json
import math
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket import bench, same_function
from pysparse_ticket.cli import app
from pysparse_ticket.measure.clock import summarised
from pysparse_ticket.models import build
from pysparse_ticket.nn.filter_sparse_conv2d import FilterSparseConv2d
from pysparse_ticket.nn.masked import MaskedModule

MLP = ("--model", "lenet-300-100", "--size", 8, "--channels", 1, "--batch-size", 16, "--repeats", 2)
RESNET = ("--model", "resnet20", "--size", 4, "--batch-size", 4, "--repeats", 2)
MLP_WEIGHTS = 64 * 300 + 300 * 100 + 100 * 10
MLP_BIASES = 300 + 100 + 10


def run(*words, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, words)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_table_and_json(tmp_path):
    words = ("--sparsity", 0.8, "--sparsity", 0.9, "--plan", "--json", tmp_path / "new" / "bench.json")
    out = run(*MLP, *words).output
    report = json.loads((tmp_path / "new" / "bench.json").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert list(arms) == ["dense contiguous", "dense channels_last", "weight 80%", "weight 90%"]
    for name, arm in arms.items():
        assert name in out and 0 < arm["p20"] <= arm["step_seconds"] <= arm["p80"] and arm["peak_bytes"] > 0
        assert (arm["joules"] is None) == arm["energy_method"].startswith("not measured")
        assert arm["speedup"] == arms[report["fastest_dense"]]["step_seconds"] / arm["step_seconds"]
    # the lowest of what is random go, so the counts are exact
    dense, ours = arms["dense contiguous"], arms["weight 90%"]
    assert (dense["macs"], dense["parameters"]) == (MLP_WEIGHTS, MLP_WEIGHTS + MLP_BIASES)
    assert (ours["macs"], ours["parameters"]) == (MLP_WEIGHTS // 10, MLP_WEIGHTS // 10 + MLP_BIASES)
    assert ours["sparsity"] == pytest.approx(0.9) and 0 <= ours["error"]["logits"] < 1e-5
    assert len(ours["plan"]) == 3 and all(row["format"] for row in ours["plan"]) and not dense["plan"]
    fastest = min(list(arms)[:2], key=lambda name: arms[name]["step_seconds"])
    assert report["fastest_dense"] == fastest and arms[fastest]["speedup"] == 1.0
    assert report["settings"]["train"]["batch_size"] == 16 and report["facts"]["torch"] == torch.__version__
    assert "revision" in report["facts"] and f"torch {torch.__version__}" in report["machine"]
    assert "break-even" in out and report["machine"] in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "name", "removed"),
    [
        ((*RESNET, "--granularity", "layer", "--remove", 1), "layer -1", 0.01),
        ((*RESNET, "--granularity", "filter", "--remove", 16), "filter -16", 0.01),
        ((*MLP, "--granularity", "block:16x16"), "block:16x16 90%", 0.89),
        ((*MLP, "--granularity", "2:4"), "2:4", 0.49),
    ],
    ids=["layer", "filter", "block", "n:m"],
)
def test_each_granularity(tmp_path, words, name, removed):
    run(*words, "--json", tmp_path / "f")
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "f").read_text())["arms"]}
    dense, ours = arms["dense contiguous"], arms[name]
    assert removed < ours["sparsity"] < 1 and ours["macs"] < dense["macs"] and ours["parameters"] < dense["parameters"]


def test_threads_are_those_asked_for_and_come_back(tmp_path):
    before = torch.get_num_threads()
    run(*MLP, "--sparsity", 0.9, "--threads", before + 1, "--json", tmp_path / "f")
    facts = json.loads((tmp_path / "f").read_text())["facts"]
    assert facts["threads"] == before + 1 and torch.get_num_threads() == before


def test_compile_competes_and_compiles_plain_tickets(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or nn.Sequential(model))

    def later_is_faster(arms, *_, **__):
        return {name: summarised([1 / (1 + i)]) for i, name in enumerate(arms)}

    monkeypatch.setattr(bench, "interleave", later_is_faster)
    run(*RESNET, "--granularity", "layer", "--remove", 1, "--compile", "--json", tmp_path / "f")
    report = json.loads((tmp_path / "f").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert report["fastest_dense"] == "dense compile"  # the third of five arms; no ticket counts as dense
    assert [arm["speedup"] for arm in arms.values()] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    assert len(compiled) == 2 and arms["dense compile"]["peak_bytes"] > 0
    assert arms["layer -1 compile"]["macs"] == arms["layer -1"]["macs"] < arms["dense compile"]["macs"]


def test_a_compiler_that_fails_gets_one_sentence(monkeypatch):
    class Broken(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            raise RuntimeError("no C++ compiler\nwith a long story")

    monkeypatch.setattr(torch, "compile", Broken)
    said = run(*MLP, "--sparsity", 0.9, "--compile", code=2).stderr
    assert "torch.compile does not run here (no C++ compiler); leave --compile out" in said


def tampered(change):
    def sparsify(model, ticket, **options):
        model = pst.sparsify(model, ticket, plan="packed")
        change(model)
        return model

    return sparsify


def scale_a_weight(model):
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, MaskedModule)).weight_parameter.mul_(1.1)


def learn_faster(model):
    """The same output, 1.2 times the gradient."""
    last = [m for m in model.modules() if isinstance(m, MaskedModule)][-1]
    last.register_forward_hook(lambda module, args, output: 1.2 * output - 0.2 * output.detach())


def break_a_weight(model):
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, MaskedModule)).weight_parameter.fill_(math.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale_a_weight, "weight 80%: the sparsified model's logits differ"),
        (break_a_weight, "weight 80%: the sparsified model's logits differ"),
        (learn_faster, "weight 80%: the sparsified model's weight updates differ"),
    ],
    ids=["scaled", "nan", "gradient"],
)
def test_a_wrong_model_is_not_timed(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(bench, "sparsify", tampered(change))
    result = run(*MLP, "--json", tmp_path / "f", code=1)
    said = " ".join(result.stderr.split())
    assert message in said and "its times would mean nothing" in said and "Traceback" not in said
    assert not (tmp_path / "f").exists() and "speed-up" not in result.output


def test_filters_of_the_reference_are_zero():
    torch.manual_seed(0)
    dense = build("resnet14", 10, (3, 8, 8))
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    ticket = pst.at_init(dense, score="random", granularity="filter", remove=24)
    twin = same_function.masked_dense(dense, ticket)
    zero = {
        n: int((m.weight.flatten(1) == 0).all(1).sum()) for n, m in twin.named_modules() if isinstance(m, nn.Conv2d)
    }
    assert sum(zero.values()) == 24 and not any((p == 0).all() for p in dense.parameters() if p.dim() > 1)
    model = pst.sparsify(dense, ticket)
    assert any(isinstance(m, FilterSparseConv2d) for m in model.modules())
    assert same_function.check("ours", model, twin, x, y)["logits"] < 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "vgg"), "unknown model 'vgg'"),
        (("--model", "vgg16", "--size", 8), "at least 16x16"),
        (("--sparsity", 1.0), "sparsity must lie in [0, 1)"),
        (("--granularity", "layers"), "unknown granularity 'layers'"),
        (("--granularity", "layer"), "takes remove="),
        (("--granularity", "layer", "--remove", 99), "cannot remove 99 blocks"),
        (("--remove", 3), "takes sparsity="),
        (("--granularity", "filter", "--sparsity", 0.5), "takes remove="),
        (("--score", "taste"), "unknown score 'taste'"),
        (("--scope", "world"), "unknown scope 'world'"),
        (("--batch-size", 0), "batch_size must be"),
        (("--classes", 0), "num_classes is at least 1"),
        (("--repeats", 0), "repeats must be at least 1"),
        (("--threads", 0), "--threads must be at least 1"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "abacus"), "device must be one that torch knows"),
        (("--json", "."), "is a folder; name a file"),
    ],
    ids=lambda words: "" if isinstance(words, str) else re.sub("^--", "", " ".join(map(str, words))),
)
def test_bad_input_gets_one_sentence_and_nothing_is_timed(monkeypatch, words, message):
    monkeypatch.setattr(bench, "interleave", lambda *_, **__: pytest.fail("timed"))
    said = " ".join(run(*RESNET, *words, code=2).stderr.split())
    assert message in said and said.count("error:") == 1 and "Traceback" not in said
