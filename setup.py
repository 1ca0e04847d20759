"""Builds the C++ ops on LibTorch's stable ABI: no pybind, no Python ABI, seconds a file, torch 2.11 and later."""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
SOURCES = sorted(p.relative_to(ROOT) for pattern in ("*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(pattern))
CUDA_SOURCES = [str(p) for p in SOURCES if p.parts[1] == "cuda"]
CPU_SOURCES = [str(p) for p in SOURCES if p.parts[1] != "cuda"]

# no -march=native: a wheel must run on another machine, so each ISA is a function attribute (csrc/cpu/isa.h)
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi"]
# compute capability 8.0 and 9.0 as machine code, later GPUs from the PTX of 9.0
CUDA_FLAGS = ["-O3", "-std=c++20", "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
CUDA_FLAGS += ["-gencode=arch=compute_90,code=compute_90"]
DEFINES = [("TORCH_TARGET_VERSION", "0x020b000000000000")]

with_cuda = bool(CUDA_SOURCES and torch.version.cuda and (shutil.which("nvcc") or os.environ.get("CUDA_HOME")))
extension = CUDAExtension if with_cuda else CppExtension

setup(
    packages=[*find_packages(include=["pysparse_ticket*"]), "pysparse_ticket.kernels"],
    ext_modules=[
        extension(
            "pysparse_ticket._C",
            CPU_SOURCES + (CUDA_SOURCES if with_cuda else []),
            include_dirs=[str(ROOT / "csrc")],
            define_macros=DEFINES + ([("USE_CUDA", None)] if with_cuda else []),
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": CUDA_FLAGS},
            extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
