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
