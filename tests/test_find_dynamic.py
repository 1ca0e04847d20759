"""Dynamic sparse training from names: its figures, its resumption, its command."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket.cli import app
from pysparse_ticket.compare import Settings, recipe
from pysparse_ticket.find_dynamic import find_dynamic
from pysparse_ticket.train import Interrupted

SETTINGS = Settings(model="lenet-300-100", size=8, train=recipe(epochs=2, batch_size=16))
WEIGHTS = 64 * 300 + 300 * 100 + 100 * 10
pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_updates_budget_and_exploration_and_the_same_bits_after_a_stop(tmp_path, method):
    options = {"method": method, "sparsity": 0.8, "seed": 3}
    ticket, history, updates = find_dynamic(SETTINGS, tmp_path / "a", **options)
    # 10 steps: a 40th of them is none, so every step; until 3/4 of them, 7
    assert [row["step"] for row in updates] == [1, 2, 3, 4, 5, 6]
    assert [row["drop"] for row in updates] == pytest.approx(
        [0.15 * (1 + math.cos(math.pi * t / 7)) for t in range(1, 7)]
    )
    kept = round(0.2 * WEIGHTS)
    assert sum(int(mask.sum()) for mask in ticket.masks.values()) == kept
    assert updates[0]["exploration"] == (kept + updates[0]["moved"]) / WEIGHTS > 0.2
    assert ticket.provenance["exploration"] == updates[-1]["exploration"] > updates[0]["exploration"]
    assert all(not ticket.rewind[name][~mask].any() for name, mask in ticket.masks.items())
    assert len(history.test_accuracy) == 2 and ticket.provenance["model"] == "lenet-300-100"

    def stop(progress):
        if progress.step == 7:  # the checkpoint is the first epoch's, step 5
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        find_dynamic(SETTINGS, tmp_path / "b", on_progress=stop, **options)
    again, resumed, rows = find_dynamic(SETTINGS, tmp_path / "b", **options)
    assert rows == updates and resumed.train_loss == history.train_loss and again.provenance == ticket.provenance
    assert all(torch.equal(mask, again.masks[name]) for name, mask in ticket.masks.items())
    assert all(torch.equal(tensor, again.rewind[name]) for name, tensor in ticket.rewind.items())


def test_the_command_writes_the_ticket_and_its_exploration_and_goes_on_only_with_the_same_settings(tmp_path):
    out = tmp_path / "t.safetensors"
    words = ["find", str(out), "--model", "lenet-300-100", "--size", "8", "--batch-size", "32", "--epochs", "1"]
    words += ["--method", "rigl", "--every", "1", "--until", "3", "--spare", "layers.0"]
    result = CliRunner().invoke(app, [*words, "--sparsity", "0.5"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    ticket, facts = pst.Ticket.load(out), json.loads((tmp_path / "t.safetensors.json").read_text())
    assert [mask.shape for mask in ticket.masks.values()] == [(100, 300), (10, 100)]
    assert facts["exploration"] == ticket.provenance["exploration"] and facts["sparsity"] == pytest.approx(0.5)
    assert [row["step"] for row in facts["updates"]] == [1, 2] and f"{facts['exploration']:.2%}" in result.output
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = CliRunner().invoke(app, [*words, "--sparsity", "0.6"])
    assert result.exit_code == 2 and "belongs to another run: its sparsity is 0.5, this one's 0.6" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
