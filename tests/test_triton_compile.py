"""The Triton kernels, compiled for GPUs that need not be there: no spills, matrix instructions, pipelines."""

import functools

import pytest
from ahead_of_time import facts_from

pytest.importorskip("triton", reason="triton is not installed")
SHARED_MEMORY = {
    90: (227, 228),
    80: (163, 164),
}  # KB: a program's, a multiprocessor's, of which each program takes one more


@functools.cache
def kernels(arch):
    """{what: facts}; a process of its own, in which nothing is interpreted"""
    return facts_from("triton_ahead.py", "--json", arch)


@pytest.mark.parametrize("arch", [90, 80])
def test_nothing_spills_and_programs_fit(arch):
    program, multiprocessor = SHARED_MEMORY[arch]
    for facts in kernels(arch):
        assert facts["spilled"] == 0, facts
        assert facts["shared"] <= program * 1024, facts
        assert facts["resident"] * (facts["shared"] + 1024) <= multiprocessor * 1024, facts
        registers = -(-facts["registers"] // 8) * 8 * 32 * facts["warps"]
        assert facts["resident"] * registers <= 65536, facts


def products(arch):
    return [facts for facts in kernels(arch) if facts["kernel"].startswith(("matmul", "weight_grad", "conv"))]


def test_hopper_multiplies_with_wgmma():
    found = [facts for facts in products(90) if facts["wgmma"]]
    strict = [facts for facts in products(90) if not facts["wgmma"]]
    assert len(found) > 35 and all("fp32" in facts["what"] for facts in strict) and len(strict) == 4
    for facts in found:
        assert not facts["serialized"] and facts["mma"] == 0, facts
        assert facts["in_flight"] >= 1, facts  # a product is waited for while the next one runs
    assert any("fp32" in facts["what"] and facts["wgmma"] == ["m64n128k8"] for facts in found)


def test_hopper_copies_by_descriptor_as_many_steps_ahead_as_asked_for():
    described = [facts for facts in products(90) if facts["bulk_copies"] and facts["wgmma"]]
    assert len(described) > 12
    # a column index loaded in the step that needs it would leave two buffers and no distance
    assert all(facts["buffers"] == facts["stages"] for facts in described), described


def test_pixels_are_copied_in_16_bytes_as_many_steps_ahead_as_asked_for():
    half = [facts for facts in products(90) if facts["kernel"].startswith("conv") and "bf16" in facts["what"]]
    assert len(half) > 12
    for facts in half:
        narrow = {4, 8} if "forward" in facts["what"] else set()  # the weight tile's own, where it is small
        assert 16 in facts["copy_bytes"] and set(facts["copy_bytes"]) <= {16} | narrow, facts
        assert facts["buffers"] == facts["stages"], facts


def test_ampere_multiplies_with_mma_and_copies_ahead():
    fast = [facts for facts in products(80) if facts["mma"]]
    assert len(fast) > 16 and all(facts["async_copies"] for facts in fast)
