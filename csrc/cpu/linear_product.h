// The passes over the batch that masked_linear (ordinary tensors in and out) and tiled_linear (packed tiles) share.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/masked_linear.h"
#include "cpu/tile_memory.h"

namespace pst {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// throws unless the tensor is build_schedule's of a pattern of that size
Schedule read_schedule(const Tensor&, int64_t rows, int64_t width, int64_t nnz);

struct Batch {
  int64_t samples;
  int64_t tiles() const { return (samples + TILE - 1) / TILE; }
  int64_t padded() const { return (samples + 15) / 16 * 16; }
  int valid(int64_t t) const { return int(std::min<int64_t>(TILE, samples - t * TILE)); }
  int lanes(int64_t t) const { return (valid(t) + 15) / 16 * 16; }
};

// Brings the source into tiles (packs it, or takes tiles as they are, behind the ReLU's gate if there is one) and, where
// target is given, multiplies them by the rows of the schedule.
struct Product {
  const LinearKernels& kernels = linear_kernels();
  Batch batch;
  Scalar type = Scalar::f32;  // of ordinary tensors
  int64_t in, out;
  bool tiled = false;  // source, gate and target are tiles
  const void *source, *gate = nullptr;
  float* packed = nullptr;       // [padded batch * in], or null: not kept
  float* column_sums = nullptr;  // [tiles, in], zeroed, or null
  void* target = nullptr;
  const float* target_gate = nullptr;  // tiles: take 0 where it is <= 0
  Schedule schedule;
  const float *weights = nullptr, *bias = nullptr;
  bool relu = false;

  void run() const;
  // the tiles of the source, once they have run
  const float* tiles() const { return as_is() ? static_cast<const float*>(source) : packed; }

 private:
  bool as_is() const { return tiled && !gate; }
  const void* row(const void* base, int64_t sample, int64_t ld) const;
  void prepare(int64_t t, int k0, int k1, float* tile) const;
  template <class F>
  void multiply(int64_t t0, int64_t t1, int c0, int c1, F tile) const;
};

// large ones in kept memory: without, clearing fresh pages was 4% of a step of 1024x1024 at 512 samples
inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type = ScalarType::Float) {
  return type == ScalarType::Float ? new_tiles(like, std::move(shape)) : torch::stable::new_empty(like, shape, type);
}

// the values in the order in which a schedule uses them; the calling thread's until its next call
const float* in_order(const Tensor& values, const Schedule&);

// products at the mask, each a sum over the batch; x and dy in tiles
Tensor weight_gradient(const Batch&, const float* x, int64_t in, const float* dy, int64_t out, const Tensor& values,
                       const Schedule&);

// [tiles, features] to [features]
Tensor sum_of_tiles(const Tensor& sums, int64_t tiles, int64_t features);

}  // namespace pst
