// Shared by the ops that keep a chain of layers in batch tiles
#pragma once
#include <vector>

#include "cpu/conv_plan.h"
#include "cpu/tensors.h"

namespace pst {

// [tiles, C, H + 2 halo, W + 2 halo, 16]
inline Plane plane_of(const Tensor& t, int64_t halo) {
  return {t.size(2) - 2 * halo, t.size(3) - 2 * halo, halo, halo, halo, halo};
}

// samples in a tile
inline int lanes_of(int64_t n, int64_t tile) { return int(std::min<int64_t>(kLanes, n - tile * kLanes)); }

// A tile's outputs are split when whole tiles do not share out evenly; parts begin at groups of outputs
inline int64_t parts_of_tile(int64_t outputs, int64_t tiles, int64_t threads) {
  return tiles % threads == 0 ? 1 : std::min((outputs + kGroup - 1) / kGroup, threads);
}
inline int64_t part_begin(int64_t outputs, int64_t part, int64_t parts) {
  return part == parts ? outputs : (outputs + kGroup - 1) / kGroup * part / parts * kGroup;
}

inline ConvShape shape_of(const Tensor& x, int64_t halo, int64_t n, int64_t o, const std::vector<int64_t>& kernel,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation) {
  const Plane p = plane_of(x, halo);
  return {n,         x.size(1), p.h,        p.w,        o,           kernel[0],  kernel[1],
          stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

// stats [3, channels]: mean, 1 / sqrt(var + eps), biased variance
// of a batch, from [tiles, channels, 3, 16] sums around origins
void combine_moments(const float* acc, int64_t tiles, int64_t channels, int64_t n, int64_t pixels, double eps, float* stats);
// of running statistics
void given_moments(const float* mean, const float* var, int64_t channels, double eps, float* stats);

// From [tiles, channels, 2, 16] sums of the gradient behind a norm, and of that times (y - mean): dnorm [2, channels], the
// gradients of weight and bias, and terms [3, channels]: the gradient of y is g * terms[0] + terms[1] + (y - mean) * terms[2]
void norm_terms(const float* sums, int64_t channels, int64_t n, int64_t pixels, const float* stats, const float* weight,
                bool batch_stats, float* dnorm, float* terms);

}  // namespace pst
