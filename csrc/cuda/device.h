// Devices and streams, on the stable ABI
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>
#include <vector>

#include "cuda/linear_schedule.h"

namespace pst::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, shape, type);
}

inline int attribute(const Tensor& t, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, t.get_device_index()));
  return value;
}

// what a block may ask for
inline Budget budget_of(const Tensor& t) {
  const Budget budget{attribute(t, cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  STD_TORCH_CHECK(budget.bytes >= LEAST_BUDGET, "masked_linear on cuda needs ", LEAST_BUDGET,
                  " bytes of shared memory a block, this GPU has ", budget.bytes, "; use backend='reference'");
  return budget;
}

inline void check_schedule(const Tensor& t, int64_t rows, int64_t width, int64_t nnz) {
  STD_TORCH_CHECK(length_fits(t.numel(), rows, width, nnz),
                  "the schedule is of another pattern: make it with linear_schedule(pattern)");
}

// The tensors' device, for as long as this lives, and its current stream
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace pst::cuda
