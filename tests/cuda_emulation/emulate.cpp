// The ops of csrc/cuda under the name pysparse_emulated, for CPU tensors
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace emulation {
struct Guard {
  explicit Guard(int) {}
};
inline AOTITorchError stream(int, void** out) {
  *out = nullptr;
  return 0;
}
}  // namespace emulation

#define CUDA CPU
#define pysparse_ticket pysparse_emulated
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(EXPR) STD_TORCH_CHECK((EXPR) == cudaSuccess, "the emulation failed")
#define aoti_torch_get_current_cuda_stream emulation::stream
namespace torch::stable::accelerator {
using EmulatedGuard = emulation::Guard;
}
#define DeviceGuard EmulatedGuard
#include "cuda/linear_schedule.cpp"
#include "cuda/masked_linear.cpp"
#include "cuda/masked_linear_kernels.cu"
#include "cuda/window_kernels.cu"
