// Launches kernels, for the type of the activations
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/masked_linear_kernels.h"
#include "cuda/scalars.h"

namespace pst::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, cudaStream_t stream,
                   Arguments... arguments) {
  if (!grid.x || !grid.y) return cudaSuccess;
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// f(T{}) with the activations' type
template <class F>
cudaError_t of_type(Scalar type, F f) {
  if (type == Scalar::f32) return f(float{});
  return type == Scalar::bf16 ? f(bf16{}) : f(half{});
}

inline unsigned ceil_div(int64_t n, int64_t d) { return unsigned((n + d - 1) / d); }

}  // namespace pst::cuda
