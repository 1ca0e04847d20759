"""The whole of "train, score, rewind" from names: its early state, its resumption, its command."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket import data as datasets
from pysparse_ticket.cli import app
from pysparse_ticket.compare import Settings, build, recipe
from pysparse_ticket.find import find_imp
from pysparse_ticket.find_trained import find_trained
from pysparse_ticket.train import Interrupted, train

SETTINGS = Settings(data="digits", model="resnet14", size=8, train=recipe(epochs=2, batch_size=32))


pytestmark = pytest.mark.usefixtures("few_digits")


def test_the_early_state_is_that_of_the_epoch_and_survives_an_interruption(tmp_path):
    ticket, history = find_trained(SETTINGS, tmp_path / "a", rewind_epoch=1, score="expectabs", remove=1, keep=1)
    assert len(history.test_accuracy) == 2 and ticket.provenance["rewind_epoch"] == 1

    data = datasets.load("digits")
    model = build(SETTINGS, data, 0)
    steps = -(-len(data.train_labels) // 32)
    train(model, data, SETTINGS.train, stop_after=steps)  # the schedule of 2 epochs, left after the first
    assert all(torch.equal(t, ticket.rewind[n]) for n, t in model.state_dict().items())

    def stop(progress):
        if progress.step == steps + 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        find_trained(SETTINGS, tmp_path / "b", rewind_epoch=1, on_progress=stop, score="expectabs", remove=1, keep=1)
    again, _ = find_trained(SETTINGS, tmp_path / "b", rewind_epoch=1, score="expectabs", remove=1, keep=1)
    assert again.layers == ticket.layers and again.provenance == ticket.provenance
    assert all(torch.equal(t, again.rewind[n]) for n, t in ticket.rewind.items())
    with pytest.raises(ValueError, match=f"b keeps the state of step {steps}, not of epoch 0; name another"):
        find_trained(SETTINGS, tmp_path / "b", rewind_epoch=0, score="expectabs", remove=1, keep=1)


def test_the_command_writes_a_ticket_that_loads_and_refuses_a_late_rewind(tmp_path):
    out = tmp_path / "t.safetensors"
    words = ["find-trained", str(out), "--model", "resnet20", "--size", "8", "--epochs", "1"]
    result = CliRunner().invoke(app, [*words, "--rewind-epoch", "1"])
    assert result.exit_code == 2 and "before the last epoch, not 1" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(app, [*words, "--score", "kl", "--remove", "2", "--steps", "2", "--samples", "64"])
    assert result.exit_code == 0, result.output
    ticket = pst.Ticket.load(out)
    assert len(ticket.removed_blocks) == 2 and all(name in result.output for name in ticket.removed_blocks)
    assert ticket.provenance["samples"] == 64 and ticket.provenance["score"] == "kl" and ticket.rewind


def test_the_short_batch_that_is_left_out_is_no_step_to_rewind_to(tmp_path):
    settings = replace(
        SETTINGS, train=replace(SETTINGS.train, epochs=1, warmup_epochs=0, milestones=(), drop_last=True)
    )
    with pytest.raises(ValueError, match="rewind_step 2 is not before the last of 2 steps"):  # 80 images in 32s
        find_imp(settings, tmp_path / "levels", rewind_step=2)
    assert not list(tmp_path.iterdir())
