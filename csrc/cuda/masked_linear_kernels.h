// The kernels of masked_linear, launched on a stream. No header of torch is in sight of nvcc, which halves the build.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/linear_schedule.h"

namespace pst::cuda {

// activations
enum class Scalar { f32, bf16, f16 };
constexpr int tokens(Scalar type) { return ROW_BYTES / (type == Scalar::f32 ? 4 : 2); }

// x [samples, features] to tiles, zeros where gate (or null) is <= 0 and above the batch;
// sums (or null) [tiles, features]: of each tile's samples
cudaError_t pack_tiles(Scalar, const void* x, const void* gate, int64_t samples, int64_t features, void* tiles, float* sums,
                       cudaStream_t);

// out[feature] = the sum of sums [tiles, features]
cudaError_t sum_tiles(const float* sums, int64_t tiles, int64_t features, float* out, cudaStream_t);

// {where thread i's first chunk of the column is in the ring, weight} of each of at most `most` entries of the products
struct Entry {
  uint32_t place;
  float weight;
};
cudaError_t gather_entries(const int32_t* schedule, const float* values, int64_t most, Entry* entries, cudaStream_t);

// y [samples, rows] = the schedule's rows times x in tiles, plus bias (or null)
cudaError_t multiply(Scalar, Budget, const int32_t* schedule, const Entry* entries, const void* x, const float* bias,
                     void* y, int64_t samples, int64_t rows, bool relu, cudaStream_t);

// weights [groups * 256], of the activations' type, 16 bits: the values at their places, zeros elsewhere
cudaError_t place_weights(Scalar, const int32_t* schedule, const float* values, int64_t nnz, void* weights, cudaStream_t);

// the same y from windows of `tiles` tiles a block and their weights
cudaError_t multiply_windows(Scalar, Budget, int tiles, const int32_t* schedule, const void* weights, const void* x,
                             const float* bias, void* y, int64_t samples, int64_t rows, bool relu, cudaStream_t);

// partial[split][entry of a cell] = <x[column], dy[row]> over a split's tiles, both in tiles; `blocks` take cells and splits
// in turn
cudaError_t sample(Scalar, Budget, const int32_t* schedule, const void* x, const void* dy, int64_t tiles, int splits,
                   int blocks, float* partial, cudaStream_t);

// grad by windows; partial [splits][nnz]
cudaError_t sample_windows(Scalar, Budget, const int32_t* schedule, const void* x, const void* dy, int64_t tiles, int64_t nnz,
                           int splits, int blocks, float* partial, float* grad, cudaStream_t);

// grad[source] = the sum of an entry's splits, in their order
cudaError_t sum_splits(const int32_t* schedule, const float* partial, int64_t most, int splits, float* grad, cudaStream_t);

}  // namespace pst::cuda
