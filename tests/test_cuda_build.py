"""Every CUDA source compiles and links against this torch, GPU or not, and no kernel spills registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
OPS = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found on PATH or in CUDA_HOME")


def resources(log):
    """{(kernel, architecture): (registers, stack bytes, spilled bytes)} out of ptxas -v."""
    found = {}
    blocks = re.split(r"Compiling entry function ", log)[1:]
    for block in blocks:
        kernel, arch = re.match(r"'(\S+)' for '(\S+)'", block).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        found[kernel, arch] = (
            int(re.search(r"Used (\d+) registers", block)[1]),
            int(stack),
            int(stores) + int(loads),
        )
    return found


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Objects of all sources, and what ptxas said of them."""
    folder = tmp_path_factory.mktemp("cuda")
    flags = ["-O3", "-std=c++20", "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}"]
    kernels = ["--ptxas-options=-v", *(f"-gencode=arch={arch},code={code}" for code, arch in TARGETS.items())]
    ops = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH / 'include'}"]
    log = ""
    for source in (*KERNELS, *OPS):
        done = subprocess.run(
            [NVCC, *flags, *(kernels if source in KERNELS else ops), "-c", source, "-o", folder / f"{source.stem}.o"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        log += done.stderr
    return folder, log


def test_no_kernel_spills_or_keeps_arrays_in_local_memory(build):
    found = resources(build[1])
    assert {arch for _, arch in found} == set(TARGETS)
    for name in (
        "multiply",
        "sample",
        "pack",
        "gather",
        "sum_splits",
        "sum_tiles",
        "window_kernel",
        "place",
        "sample_windows",
    ):
        assert any(name in kernel for kernel, _ in found), name
    assert {key: values for key, values in found.items() if values[1] or values[2]} == {}
    # 512 threads share the 65536 registers of a multiprocessor
    assert {key: values for key, values in found.items() if values[0] > 128} == {}


def test_links_and_loads(build):
    """What a CPU build of torch lacks, the current CUDA stream, is looked up when it is first called."""
    folder = build[0]
    library = folder / "ops.so"
    objects = [folder / f"{source.stem}.o" for source in (*KERNELS, *OPS)]
    done = subprocess.run(
        [NVCC, "-shared", "-cudart=shared", *objects, "-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    undefined = subprocess.run(["nm", "-DuC", library], capture_output=True, text=True, check=True).stdout
    provided = subprocess.run(
        ["nm", "-D", "--defined-only", TORCH / "lib/libtorch_cpu.so"], capture_output=True, text=True, check=True
    ).stdout
    known = {line.split()[-1].split("@")[0] for line in provided.splitlines()}
    needed = {line.split()[-1] for line in undefined.splitlines()}
    ours = {name for name in needed if name.startswith(("aoti_torch", "torch_"))}
    assert ours, "the ops use the stable ABI"
    assert ours - known <= {
        "aoti_torch_get_current_cuda_stream",
        "torch_c10_cuda_check_msg",
        "torch_c10_cuda_free_error_msg",
    }
    # no symbol of torch's C++ ABI
    assert not [name for name in needed if name.startswith(("at::", "c10::", "torch::"))]
