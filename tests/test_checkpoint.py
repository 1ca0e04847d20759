from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import sys
from contextlib import contextmanager
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
import training_worker as worker
from safetensors.torch import save_file

from pysparse_ticket import checkpoint as checkpoints
from pysparse_ticket import files
from pysparse_ticket.train import Interrupted, TrainConfig, train

KINDS = ["sgd", "adamw"]
# children come from a server that has torch imported, which takes 4 s each time otherwise
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([worker.__name__])


@pytest.fixture(scope="module", autouse=True)
def server():
    with pytest.MonkeyPatch.context() as patch:  # before 3.13 the server does not take over sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def one_thread():
    threads, states = torch.get_num_threads(), checkpoints.rng_state(torch.device("cpu"))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    checkpoints.set_rng_state(states, torch.device("cpu"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The final checkpoint of each kind of run that nobody disturbs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trees = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp("whole") / kind
        worker.run(kind, path)
        trees[kind] = checkpoints.load(path)
    torch.set_num_threads(threads)
    return trees


def assert_same(ours, theirs, where=""):
    """Bit for bit, seconds apart."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            if key != "seconds":
                assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride(), where
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


@contextmanager
def child(kind, path, **options):
    """A process that trains, and the test's end of the link to it."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=worker.main, args=(theirs, kind, path), kwargs=options)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def advance(link, until=None) -> str:
    """Lets the child go on until it waits at the line ``until``, or ends; returns its last line."""
    while True:
        line = link.recv()
        if line == until or not line.startswith(("step", "fsync")):
            return line
        link.send("go on")


# checkpoints are at 0, 3, 6, ...: the seeded kills land between two of them, in the first and in a later epoch
@pytest.mark.parametrize(
    ("kind", "step"),
    [("sgd", random.Random(0).choice([7, 8, 10, 11])), ("adamw", random.Random(1).choice([1, 2, 4, 5]))],
)
def test_killed_and_resumed_run_ends_with_the_same_bits(kind, step, uninterrupted, tmp_path):
    path = tmp_path / "run.safetensors"
    with child(kind, path) as (process, link):
        assert advance(link, until=f"step {step}") == f"step {step}"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert checkpoints.load(path)["step"] == step // 3 * 3
    with child(kind, path) as (process, link):
        assert advance(link) == "end"
        process.join()
    assert_same(checkpoints.load(path), uninterrupted[kind])


def test_killed_while_writing_keeps_the_checkpoint_before(uninterrupted, tmp_path):
    path = tmp_path / "run.safetensors"
    with child("sgd", path, stop_in_write=True) as (process, link):
        # two a checkpoint, of the file and of its folder: the fifth is that of step 6's file, not yet renamed
        assert advance(link, until="fsync 5") == "fsync 5"
        process.kill()
        process.join()
    assert checkpoints.load(path)["step"] == 3
    assert (tmp_path / "run.safetensors.tmp").exists()
    worker.run("sgd", path)
    assert_same(checkpoints.load(path), uninterrupted["sgd"])
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_ctrl_c_keeps_the_last_whole_step_and_says_how_to_go_on(uninterrupted, tmp_path):
    path = tmp_path / "run.safetensors"
    with child("sgd", path) as (process, link):
        advance(link, until="step 5")
        os.kill(process.pid, signal.SIGINT)
        link.send("go on")
        last = advance(link)
    assert last == (
        f"interrupted: stopped after step 5 of 12; {path} keeps step 5: run the same again to go on from it"
    )
    assert checkpoints.load(path)["step"] == 5
    worker.run("sgd", path)
    assert_same(checkpoints.load(path), uninterrupted["sgd"])


def test_ctrl_c_during_evaluation_keeps_the_epoch(uninterrupted, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pysparse_ticket.train.evaluate", interrupted)
        with pytest.raises(Interrupted, match="keeps step 4"):
            worker.run("sgd", path)
    worker.run("sgd", path)
    assert_same(checkpoints.load(path), uninterrupted["sgd"])


def test_interrupt_inside_a_step_keeps_the_checkpoint_before(tmp_path):
    path = tmp_path / "run.safetensors"

    def second_ctrl_c(progress):
        if progress.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="keeps step 3"):
        worker.run("sgd", path, on_step=second_ctrl_c)
    assert checkpoints.load(path)["step"] == 3


def test_ctrl_c_without_checkpoint_says_what_was_missing():
    with pytest.raises(Interrupted, match="pass checkpoint="):
        worker.run("sgd", None, on_step=lambda progress: signal.raise_signal(signal.SIGINT))


@pytest.mark.parametrize("stop", [2, 4, 9])
def test_stopped_run_goes_on_to_the_same_bits(stop, uninterrupted, tmp_path):
    path = tmp_path / "run.safetensors"
    history = worker.run("sgd", path, stop_after=stop)
    assert history.steps == [4, 8][: stop // 4]
    assert checkpoints.load(path)["step"] == stop
    history = worker.run("sgd", path)
    assert history.train_loss == uninterrupted["sgd"]["history"]["train_loss"]
    assert_same(checkpoints.load(path), uninterrupted["sgd"])


def test_finished_run_trains_no_further(tmp_path):
    path = tmp_path / "run.safetensors"
    first = worker.run("sgd", path)
    written = path.read_bytes()
    again = worker.run("sgd", path, on_step=lambda progress: pytest.fail("a step was done"))
    assert again == first
    assert path.read_bytes() == written


def test_extra_tensors_come_back_in_place(tmp_path):
    path = tmp_path / "run.safetensors"
    mask = torch.tensor([True, False, True])
    worker.run("sgd", path, extra={"mask": mask}, stop_after=2)
    other = torch.zeros(3, dtype=torch.bool)
    worker.run("sgd", path, extra={"mask": other}, stop_after=2)
    assert torch.equal(other, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.2, "seed": 9}, r"its lr is 0\.05, this one's 0\.2"),
        ({"milestones": (1,)}, r"its milestones is \(2,\), this one's \(1,\)"),
    ],
    ids=["lr", "milestones"],
)
def test_resume_under_another_config_is_refused(change, message, tmp_path):
    path = tmp_path / "run.safetensors"
    worker.run("sgd", path, stop_after=1)
    written = path.read_bytes()
    config = TrainConfig(**{**vars(worker.CONFIG), **change})
    with pytest.raises(ValueError, match=message):
        train(worker.build("sgd")[0], worker.Images(), config, checkpoint=path)
    assert path.read_bytes() == written


def test_resume_of_another_model_data_or_optimizer_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    worker.run("sgd", path, stop_after=1)
    model, optimizer = worker.build("adamw")
    with pytest.raises(ValueError, match="its optimizer is 'SGD', this one's 'AdamW'"):
        train(model, worker.Images(), worker.CONFIG, optimizer=optimizer, checkpoint=path)
    with pytest.raises(ValueError, match="its number of training samples is 40, this one's 44"):
        train(model, worker.Images(train=44), worker.CONFIG, checkpoint=path)
    model[6] = torch.nn.Linear(144, 3)
    with pytest.raises(ValueError, match=r"its shape of 6.weight is \(2, 144\), this one's \(3, 144\)"):
        train(model, worker.Images(), worker.CONFIG, checkpoint=path)
    train(model, worker.Images(), worker.CONFIG, checkpoint=path, resume=False)
    assert checkpoints.load(path)["step"] == worker.STEPS


class FullDisk:
    """A file on a disk that has room for half of what is written."""

    def __init__(self, path, mode):
        self.file = open(path, mode)  # noqa: SIM115 (closed in __exit__)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, blob):
        self.file.write(blob[: len(blob) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    worker.run("sgd", path, stop_after=3)
    written = path.read_bytes()
    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match=f"cannot write {path}: No space left on device; the previous one is") as caught:
        worker.run("sgd", path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == written
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_file_size_limit_of_the_system_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "run.safetensors"
    checkpoints.save(path, {"x": torch.ones(4)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a real short write, where root passes any permission
    try:
        with pytest.raises(OSError, match=r"cannot write .*File too large"):
            checkpoints.save(path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(checkpoints.load(path)["x"], torch.ones(4))
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_folder_that_is_a_file_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write .*nothing was left behind"):
        worker.run("sgd", tmp_path / "file" / "run", on_step=lambda progress: pytest.fail("a step was done"))
    assert (tmp_path / "file").read_text() == "mine"


def test_tree_comes_back_as_it_was(tmp_path):
    shared = torch.arange(24.0).reshape(1, 2, 3, 4)
    tree = {
        "numbers": [1, 2.5, float("inf"), 0.1, True, None, "text"],
        7: ((0.9, 0.999), {"empty": {}}),
        "channels last": shared.contiguous(memory_format=torch.channels_last),
        "pointwise": torch.ones(3, 5, 1, 1).to(memory_format=torch.channels_last),
        "transposed": shared[0, 0].t(),
        "tied": {"a": shared, "b": shared},
        "a/b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "types": [torch.tensor([1.5], dtype=kind) for kind in (torch.float64, torch.bfloat16, torch.float16)],
        "bytes": torch.tensor([True, False]),
        "nothing": torch.empty(0, 3),
    }
    checkpoints.save(tmp_path / "tree", tree)
    assert_same(checkpoints.load(tmp_path / "tree"), tree)


def test_generators_go_on_where_they_were():
    cpu = torch.device("cpu")
    random.gauss(0, 1)  # leaves a second number waiting, as numpy's does
    np.random.randn()
    state = checkpoints.rng_state(cpu)
    draws = [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist()]
    checkpoints.set_rng_state(state, cpu)
    assert draws == [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist()]


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(TypeError, match="cannot hold the set model/x"):
        checkpoints.save(tmp_path / "bad", {"model": {"x": {1}}})
    with pytest.raises(TypeError, match=r"the tuple key \(1, 2\)"):
        checkpoints.save(tmp_path / "bad", {"model": {(1, 2): 0}})
    assert os.listdir(tmp_path) == []


def test_foreign_and_truncated_files_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoints.load(path)
    checkpoints.save(path, {"x": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoints.load(path)
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoints.load(path)
    save_file({"x": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="give the path of a checkpoint"):
        checkpoints.load(path)
    checkpoints.save(path, {"x": torch.ones(3)})
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        worker.run("sgd", path)
