"""Settings of the whole suite, made before torch is imported."""

import pytest
from bf16 import avoid_broken_amx

avoid_broken_amx()


@pytest.fixture(autouse=True)
def plan_cache(tmp_path_factory, monkeypatch):
    """Races of the tests stay out of the user's cache."""
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path_factory.getbasetemp() / "plans"))


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
