"""The line that every stored figure carries."""

import subprocess
import sys

import pytest

from pysparse_ticket.report import machine, machine_line
from pysparse_ticket.report.machine import revision


def refuse(error):
    def run(*_, **__):
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10), subprocess.CalledProcessError(128, "git")],
    ids=["absent", "slow", "another-owner"],
)
def test_a_git_that_does_not_answer_costs_the_revision_alone(monkeypatch, tmp_path, error):
    monkeypatch.setattr(subprocess, "run", refuse(error))
    monkeypatch.setattr(sys.modules[revision.__module__], "__file__", str(tmp_path / "a" / "b" / "machine.py"))
    (tmp_path / ".git").mkdir()
    assert revision() is None
    assert "revision None" in machine_line(machine())


def test_the_revision_tells_of_changed_files_but_stored_results(monkeypatch, tmp_path):
    source, result = tmp_path / "a" / "b" / "machine.py", tmp_path / "benchmarks" / "results" / "cpu.csv"
    monkeypatch.setattr(sys.modules[revision.__module__], "__file__", str(source))
    for path in (source, result):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*names, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    clean = revision()
    result.write_text("2")
    assert revision() == clean and not clean.endswith("+")
    source.write_text("2")
    assert revision() == clean + "+"
