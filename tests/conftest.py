"""Settings of the whole suite, made before torch is imported."""

import functools
import os
import warnings

import pytest
from bf16 import avoid_broken_amx

avoid_broken_amx()

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is decorated: they run on CPU tensors then


@functools.cache
def gpu_is_there():
    """Whether torch sees one; its convolutions are then kept from TF32, whose 10 bits no tolerance here allows."""
    import torch

    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the newer setting is not of one mind with what compilers read
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Tests of Triton kernels are the GPU's where there is one, and are interpreted elsewhere."""
    for item in items:
        if "gpu_or_interpreter" in item.fixturenames and gpu_is_there():
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not gpu_is_there():
        pytest.skip("no CUDA GPU is visible")


@pytest.fixture
def gpu_or_interpreter():
    """The device of the Triton kernels: the GPU, or the CPU under triton's interpreter."""
    from pysparse_ticket.ops.library import interpreted, why_missing

    if reason := why_missing("triton"):
        pytest.skip(reason)
    return "cpu" if interpreted() else "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that the ops and modules run on."""
    return request.param


@pytest.fixture(autouse=True)
def plan_cache(tmp_path_factory, monkeypatch):
    """Races of the tests stay out of the user's cache, and take five steps of each arm."""
    from pysparse_ticket import planner

    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path_factory.getbasetemp() / "plans"))
    monkeypatch.setattr(planner, "STEP_SECONDS", 0.0)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    """Each instruction set of the C++ kernels that this machine runs."""
    from pysparse_ticket.ops.library import cpu_isa

    try:
        cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    cpu_isa("")


@pytest.fixture
def poison():
    """Fresh memory holds NaN, so that whatever a kernel forgets to write shows."""
    import torch

    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="module")
def one_thread():
    """Sums in one order, whatever the machine has."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_digits(monkeypatch):
    """For commands that train: 80 digits of 8x8 pixels and 20 to test on, whatever data set is asked for."""
    from pysparse_ticket import data as datasets

    few = datasets.load("digits", size=8).subset(train=80, test=20)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: few)
    return few
