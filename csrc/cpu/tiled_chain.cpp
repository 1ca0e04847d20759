#include "cpu/tiled_chain.h"

#include <cmath>

namespace pst {

void combine_moments(const float* acc, int64_t tiles, int64_t channels, int64_t n, int64_t pixels, double eps, float* stats) {
  const double count = double(n) * double(pixels);
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0, spread = 0;
    for (int64_t t = 0; t < tiles; ++t)
      for (int l = 0; l < lanes_of(n, t); ++l) {
        const float* a = acc + (t * channels + c) * 3 * kLanes + l;
        total += double(a[0]) * double(pixels) + double(a[kLanes]);
      }
    const double mean = total / count;
    for (int64_t t = 0; t < tiles; ++t)
      for (int l = 0; l < lanes_of(n, t); ++l) {
        const float* a = acc + (t * channels + c) * 3 * kLanes + l;
        const double shift = double(a[0]) - mean;
        spread += double(a[2 * kLanes]) + 2 * shift * double(a[kLanes]) + shift * shift * double(pixels);
      }
    const double var = std::max(0.0, spread / count);
    stats[c] = float(mean);
    stats[channels + c] = float(1 / std::sqrt(var + eps));
    stats[2 * channels + c] = float(var);
  }
}

void given_moments(const float* mean, const float* var, int64_t channels, double eps, float* stats) {
  for (int64_t c = 0; c < channels; ++c) {
    stats[c] = mean[c];
    stats[channels + c] = float(1 / std::sqrt(double(var[c]) + eps));
    stats[2 * channels + c] = var[c];
  }
}

void norm_terms(const float* sums, int64_t channels, int64_t n, int64_t pixels, const float* stats, const float* weight,
                bool batch_stats, float* dnorm, float* terms) {
  const double count = double(n) * double(pixels);
  const int64_t tiles = (n + kLanes - 1) / kLanes;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t t = 0; t < tiles; ++t)
      for (int l = 0; l < lanes_of(n, t); ++l) {
        sum += sums[(t * channels + c) * 2 * kLanes + l];
        product += sums[((t * channels + c) * 2 + 1) * kLanes + l];
      }
    const double inv = stats[channels + c], scale = (weight ? weight[c] : 1.f) * inv;
    dnorm[c] = float(product * inv);
    dnorm[channels + c] = float(sum);
    terms[c] = float(scale);
    terms[channels + c] = batch_stats ? float(-scale * sum / count) : 0.f;
    terms[2 * channels + c] = batch_stats ? float(-scale * inv * inv * product / count) : 0.f;
  }
}

}  // namespace pst
