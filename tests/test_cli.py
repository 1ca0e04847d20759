import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket.checkpoint import load
from pysparse_ticket.cli import app


def run(*words, code=0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_info_names_every_backend_with_a_reason():
    out = run("info").output
    for name in ("reference", "cpu", "triton", "cuda"):
        assert f"backend {name}" in out
    assert pst.__version__ in out and "torch" in out


def test_find_writes_a_ticket_that_loads(tmp_path):
    out = run(
        "find", tmp_path / "t.safetensors", "--model", "resnet20", "--size", 8, "--remove", 2, "--score", "snip"
    ).output
    ticket = pst.Ticket.load(tmp_path / "t.safetensors")
    assert len(ticket.removed_blocks) == 2 and all(name in out for name in ticket.removed_blocks)


def test_compare_writes_everything(tmp_path):
    words = (
        "compare",
        "--model",
        "resnet20",
        "--size",
        8,
        "--epochs",
        1,
        "--seeds",
        1,
        "--remove",
        2,
        "--batch-size",
        512,
    )
    out = run(*words, "--runs", tmp_path, "--name", "r", "--country", "BRA").output
    arms = json.loads((tmp_path / "r" / "summary.json").read_text())
    names = ["dense", "layers grasp -2", "layers snip -2", "layers random -2", "filters grasp", "weights 90%"]
    assert [arm["name"] for arm in arms] == names
    for arm in arms:
        assert arm["macs"] > 0 and arm["peak_bytes"] > 0 and arm["train_seconds"] > 0 and arm["seeds"] == [0]
        assert 0 < arm["accuracy"]["mean"] < 1 and "std" in arm["accuracy"]
        assert (arm["joules"] is None) == arm["energy_method"].startswith("not measured")
        assert arm["name"] in out
    assert arms[0]["speedup"] == 1.0 and not arms[0]["plan"]
    # resnet20 at 8x8: one block is 4,718,592 / 16 MACs; 3 -> 1 input channels in the stem
    assert arms[1]["macs"] == arms[0]["macs"] - 2 * 4_718_592 // 16
    assert arms[5]["parameters"] == arms[0]["parameters"] - 270_608 + round(0.1 * 270_608)
    assert (tmp_path / "r" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "weights 90%" in (tmp_path / "r" / "table.md").read_text()
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    assert facts["torch"] and facts["settings"]["seeds"] == 1
    tickets = sorted(p.name for p in (tmp_path / "r").glob("*.ticket.safetensors"))
    assert len(tickets) == 5 and all(pst.Ticket.load(tmp_path / "r" / t).rewind for t in tickets)
    again = run(*words, "--runs", tmp_path, "--name", "r", "--country", "BRA")
    assert again.exit_code == 0
    resumed = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert [a["train_seconds"] for a in resumed] == [a["train_seconds"] for a in arms]


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    words = ["--model", "resnet20", "--size", "8", "--epochs", "500", "--seeds", "1", "--remove", "1"]
    words = [sys.executable, "-m", "pysparse_ticket.cli", "compare", *words, "--runs", str(tmp_path), "--name", "r"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "r" / "dense-seed0.checkpoint"
    before = None
    while process.poll() is None:  # until an epoch's checkpoint has replaced the first one
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        if before and stamp != before:
            break
        before = before or stamp
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130 and "compare --name r and the same options" in " ".join(message.split()), message
    assert "Traceback" not in message and load(checkpoint)["step"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vgg"], "resnet20"),
        (["--data", "mnist"], "digits"),
        (["--data", "cifar10", "--root", "/nowhere"], "/nowhere"),
        (["--sparsity", "1.0"], "sparsity must lie in [0, 1)"),
        (["--remove", "10"], "cannot remove 10 blocks"),
        (["--epochs", "0"], "epochs"),
        (["--country", "XYZ"], "BRA"),
        (["--device", "cuda:9"], "cuda"),
    ],
    ids=lambda v: v[1] if isinstance(v, list) else "",
)
def test_bad_input_gets_one_sentence_and_code_2(tmp_path, words, message):
    words = ["compare", "--epochs", "1", "--seeds", "1", "--size", "8", "--runs", str(tmp_path), *words]
    result = run(*words, code=2)
    assert message in result.stderr and "Traceback" not in result.output + result.stderr
