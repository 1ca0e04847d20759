"""What a user may get wrong: one sentence, exit code 2, and no file of theirs touched."""

import pytest
import torch
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket.cli import app
from pysparse_ticket.compare import Settings, check_same_settings, recipe
from pysparse_ticket.models import build

pytestmark = pytest.mark.usefixtures("few_digits")
SMALL = ("--model", "lenet-300-100", "--size", "8", "--epochs", "1", "--batch-size", "32")
IMP = ("find", "t", *SMALL, "--method", "imp", "--rounds", "1", "--rewind-step", "1")
RIGL = ("find", "t", *SMALL, "--method", "rigl")
TRAINED = ("find-trained", "t", "--model", "resnet20", "--size", "8", "--epochs", "1", "--batch-size", "32")
AT_INIT = ("find", "t", "--model", "resnet14", "--size", "8")


def refused(words, message):
    result = CliRunner().invoke(app, list(words))
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert message in said and said.count("error:") == 1 and "Traceback" not in result.output + said, said


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("mine")
    torch.manual_seed(0)
    ticket = pst.at_init(build("resnet14", 10, (1, 8, 8)), score="random", granularity="weight", sparsity=0.5)
    ticket.save("weights")
    ticket.rewind = None
    ticket.save("bare")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*IMP, "--importance", "zscore"), "unknown importance 'zscore'; known: magnitude, l1, l2"),
        ((*IMP, "--rate", "1.2"), "in (0, 1), not 1.2"),
        ((*IMP, "--rate", "0.2", "--rate", "0.2"), "2 values were given for 1 rounds"),
        ((*IMP, "--sparsity", "1"), "rise from above 0 to below 1"),
        ((*IMP, "--sparsity", "0.5", "--rate", "0.2"), "give rate= or sparsities=, not both"),
        ((*IMP, "--rewind-step", "3"), "rewind_step 3 is not before the last of 3 steps"),
        ((*IMP, "--control", "other"), "unknown control 'other'"),
        ((*IMP, "--granularity", "3:2"), "unknown granularity '3:2'"),
        ((*IMP, "--spare", "nothing"), "spare= names 'nothing'"),
        ((*IMP, "--mode", "weights", "--score", "snip"), "--score does not go with --method imp"),
        ((*IMP, "--every", "2"), "--every does not go with --method imp"),
        (
            ("find", "t", "--method", "imp", "--model", "resnet20", "--granularity", "layer", "--rounds", "9"),
            "would leave",
        ),
        ((*RIGL, "--sparsity", "1.5"), "sparsity"),
        ((*RIGL, "--sparsity", "0.5", "--sparsity", "0.6"), "only --method imp takes more than one --sparsity"),
        ((*RIGL, "--distribution", "even"), "unknown distribution 'even'"),
        ((*RIGL, "--rounds", "2"), "--rounds does not go with --method rigl"),
        ((*RIGL, "--every", "0"), "every must be 1 step or more"),
        ((*RIGL, "--device", "cuda:9"), "cuda"),
        ((*AT_INIT, "--score", "hrank"), "unknown score 'hrank'"),
        ((*AT_INIT, "--remove", "99"), "cannot remove 99 blocks"),
        ((*AT_INIT, "--state", "bare", "--remove", "1"), "no rewind state"),
        ((*AT_INIT, "--twin-of", "weights"), "removes no convolution"),
        ((*AT_INIT, "--twin-of", "weights", "--remove", "3"), "leave --remove out"),
        (("find", "t", "--method", "magic"), "unknown method 'magic'; known: at-init, imp, set, rigl"),
        (("find", "t", "--model", "resnet21"), "depth 6 n + 2"),
        ((*TRAINED, "--rewind-epoch", "1"), "before the last epoch, not 1"),
        ((*TRAINED, "--score", "taste"), "unknown score 'taste'"),
        ((*TRAINED, "--score", "hrank", "--granularity", "weight", "--sparsity", "0.5"), "unknown score 'hrank'"),
        ((*TRAINED, "--remove", "9"), "cannot remove 9 blocks"),
        ((*TRAINED, "--mode", "learning-rate", "--reinit"), "take one of the two"),
        (("transfer", "weights", "--out", "t", "--target", "resnet20", "--mapping", "0:0;1:1"), "target unit 2 empty"),
        (("transfer", "weights", "--out", "t", "--target", "resnet20", "--mapping", "0:0;1:1;7:2"), "source unit 7"),
        (("transfer", "weights", "--out", "t", "--target", "vgg16"), "the source has 3 stages, the target 5"),
        (("transfer", "weights", "--out", "t", "--target", "resnet20", "--stages", "body"), "'body' holds no numbered"),
        (("transfer", "t", "--out", "t", "--target", "resnet20"), "truncated or not a ticket"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_sentence_and_nothing_touched(here, words, message):
    before = contents(here)
    refused(words, message)
    assert contents(here) == before


@pytest.mark.parametrize(
    ("words", "other", "message"),
    [
        (IMP, ("--importance", "l1"), "holds another search: its importance is 'magnitude', this one's 'l1'"),
        (IMP, ("--seed", "1"), "holds another search: its seed is 0, this one's 1"),
        (RIGL, ("--drop", "0.5"), "belongs to another run: its drop is 'absent', this one's 0.5"),
        (RIGL, ("--lr", "0.2"), "belongs to another run: its lr is 0.1, this one's 0.2"),
        (TRAINED, ("--lr", "0.2"), "belongs to another run: its lr is 0.1, this one's 0.2"),
        (TRAINED, ("--model", "resnet26"), "belongs to another run: its number of parameters in optimizer group 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_or_checkpoint_of_other_settings_is_left_alone(here, words, other, message):
    first = CliRunner().invoke(app, list(words))
    assert first.exit_code == 0, first.output + repr(first.exception)
    before = contents(here)
    refused([*words, *other], message)
    assert contents(here) == before


def test_a_comparison_of_other_settings_is_left_alone(here):
    check_same_settings(here / "r", Settings(model="resnet20", size=8, train=recipe(1, 32)))
    (here / "r" / "dense-seed0.checkpoint").write_text("trained")
    before = contents(here)
    words = ["compare", "--name", "r", "--runs", ".", "--model", "resnet20", "--size", "8", "--epochs", "1"]
    words += ["--batch-size", "32"]
    refused([*words, "--sparsity", "0.8"], "r holds another comparison: its sparsity is 0.9, this one's 0.8")
    refused([*words, "--batch-size", "16"], "r holds another comparison: its batch_size is 32, this one's 16")
    assert contents(here) == before
