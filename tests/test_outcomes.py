"""Outcomes kept for later processes: every writer's, whatever happens to the folder."""

import threading
import time

import pytest

from pysparse_ticket import outcomes
from pysparse_ticket.outcomes import Outcomes


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_another_process_kept_meanwhile_stays():
    one, other = Outcomes("tiles.json"), Outcomes("tiles.json")
    one.keep("a", {"warps": 4})
    other.keep("b", {"warps": 8})
    assert Outcomes("tiles.json").known == other.known == {"a": {"warps": 4}, "b": {"warps": 8}}
    assert Outcomes("plans.json").known == {}


def test_writers_at_the_same_moment_lose_nothing(monkeypatch):
    pytest.importorskip("fcntl")
    write = outcomes.write_whole

    def slow(path, blob):
        time.sleep(0.01)  # the others read the file before this one replaces it, were they not kept from it
        write(path, blob)

    monkeypatch.setattr(outcomes, "write_whole", slow)
    together = threading.Barrier(3)

    def writer(name):
        own = Outcomes("tiles.json")
        together.wait()
        for i in range(4):
            own.keep(f"{name}{i}", i)

    threads = [threading.Thread(target=writer, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Outcomes("tiles.json").known == {f"{name}{i}": i for name in "abc" for i in range(4)}


def test_a_folder_that_cannot_be_written_loses_the_file_alone(folder):
    folder.write_text("a file where the folder would be")
    kept = Outcomes("tiles.json")
    kept.keep("a", 1)
    assert kept.known == {"a": 1} and Outcomes("tiles.json").known == {}


def test_a_broken_file_is_written_anew(folder):
    folder.mkdir()
    (folder / "tiles.json").write_text('{"a": 1')
    Outcomes("tiles.json").keep("b", 2)
    assert Outcomes("tiles.json").known == {"b": 2}
