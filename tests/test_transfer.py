"""The command ``pysparse-ticket transfer``."""

import pytest
import torch
from nets import batch, resnet
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket.cli import app
from pysparse_ticket.models import build


@pytest.fixture
def ticket(tmp_path):
    found = pst.at_init(resnet(14), batch(), score="magnitude", granularity="weight", sparsity=0.5)
    found.provenance |= {"data": "digits", "model": "resnet14"}
    found.save(tmp_path / "ticket")
    return tmp_path / "ticket"


def run(*words, code=0):
    result = CliRunner().invoke(app, ["transfer", *map(str, words)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split()), " ".join(result.stderr.split())


def test_it_stretches(ticket, tmp_path):
    out, _ = run(ticket, "--source", "resnet14", "--target", "resnet20", "--order", "append", "--out", tmp_path / "new")
    result, given = pst.Ticket.load(tmp_path / "new", resnet(20)), pst.Ticket.load(ticket)
    assert torch.equal(result.masks["stage3.2.conv2.weight"], given.masks["stage3.1.conv2.weight"])
    assert torch.equal(result.rewind["stem.weight"], given.rewind["stem.weight"])
    assert result.provenance["mapping"] == "0:0;1:1,2" and result.provenance["model"] == "resnet20"
    assert result.provenance["data"] == "digits" and result.provenance["source"]["model"] == "resnet14"
    for words in (f"{result.sparsity:.2%}", f"the source's {given.sparsity:.2%}", "mapping 0:0;1:1,2"):
        assert words in out


def test_its_own_mapping_units_and_controls(ticket, tmp_path):
    def transfer(*words):
        run(ticket, "--target", "resnet20", "--out", tmp_path / "new", *words)
        return pst.Ticket.load(tmp_path / "new")

    plain = transfer()
    mapped = transfer("--mapping", "0:0;1:2,1")
    assert mapped.provenance["mapping"] == "0:0;1:2,1" and mapped.provenance["order"] is None
    assert transfer("--units", "1").provenance["units"] == 1
    fresh = transfer("--control", "reinit", "--seed", 4)
    torch.manual_seed(4)
    assert torch.equal(fresh.rewind["fc.weight"], build("resnet20", 10, (3, 32, 32)).fc.weight)
    mixed = transfer("--control", "random-mask")
    assert not torch.equal(mixed.masks["fc.weight"], plain.masks["fc.weight"])


def test_snip_for_the_added_blocks_reads_data(tmp_path):
    torch.manual_seed(0)
    found = pst.at_init(build("mlp-2", 10, (1, 8, 8)), score="magnitude", granularity="weight", sparsity=0.5)
    found.save(tmp_path / "ticket")
    words = ("--target", "mlp-3", "--control", "snip-added", "--size", 8, "--out", tmp_path / "new")
    run(tmp_path / "ticket", *words)
    masks = pst.Ticket.load(tmp_path / "new").masks
    assert int(masks["layers.2.weight"].sum()) == round((1 - found.sparsity) * 300 * 300)
    assert torch.equal(masks["layers.1.weight"], found.masks["layers.1.weight"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "resnet20", "--source", "resnet32"], "another architecture"),
        (["--target", "vgg16"], "the source has 3 stages, the target 5"),
        (["--target", "mlp-3"], "another family of networks"),
        (["--target", "resnet21"], "depth 6 n + 2"),
        (["--target", "resnet20", "--mapping", "0:0;1:1"], "leaves target unit 2 empty"),
        (["--target", "resnet20", "--mapping", "0:0;1:1;5:2"], "names source unit 5"),
        (["--target", "resnet20", "--mapping", "0:0;1:1,2,1"], "assigns target unit 1 twice"),
        (["--target", "resnet20", "--order", "sideways"], "unknown order"),
        (["--target", "resnet20", "--units", "few"], "'few'"),
        (["--target", "resnet20", "--control", "other"], "unknown control"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_gets_one_sentence_and_writes_nothing(ticket, tmp_path, words, message):
    (tmp_path / "new").write_text("mine")
    out, err = run(ticket, "--out", tmp_path / "new", *words, code=2)
    assert message in err and "Traceback" not in out + err
    assert (tmp_path / "new").read_text() == "mine"


def test_no_rewind_state_and_no_ticket(tmp_path):
    found = pst.at_init(resnet(14), score="magnitude", granularity="weight", sparsity=0.5, rewind=False)
    found.save(tmp_path / "bare")
    words = ("--target", "resnet20", "--out", tmp_path / "new")
    assert "no rewind state" in run(tmp_path / "bare", *words, code=2)[1]
    assert "no ticket at" in run(tmp_path / "absent", *words, code=2)[1]
    assert not (tmp_path / "new").exists()
