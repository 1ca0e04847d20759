// Chains of masked_linear on packed tiles (masked_linear.h), flat tensors of padded batch * features floats.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/linear_product.h"
#include "cpu/parallel.h"

namespace pst {
namespace {

void check_tiles(const Tensor& tiles, const Batch& batch, int64_t features, const char* name) {
  STD_TORCH_CHECK(tiles.scalar_type() == ScalarType::Float && tiles.is_contiguous() &&
                      tiles.numel() == batch.padded() * features,
                  name, " has ", tiles.numel(), " floats; ", batch.samples, " samples of ", features, " features take ",
                  batch.padded() * features);
}

constexpr int64_t BLOCK = 64;  // features a piece of work

// f(tile, first feature, end) for all pieces of all tiles
template <class F>
void for_pieces(const Batch& batch, int64_t features, const F& f) {
  const int64_t blocks = (features + BLOCK - 1) / BLOCK;
  parallel_ranges(batch.tiles() * blocks, num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % blocks * BLOCK;
      f(i / blocks, int(k), int(std::min(features, k + BLOCK)));
    }
  });
}

// [samples, features] to tiles
Tensor linear_pack(Tensor x) {
  x = torch::stable::contiguous(x);
  const Batch batch{x.size(0)};
  const int64_t features = x.size(1);
  Tensor tiles = empty(x, {batch.padded() * features});
  const float* from = x.const_data_ptr<float>();
  float* to = tiles.mutable_data_ptr<float>();
  const LinearKernels& kernels = linear_kernels();
  for_pieces(batch, features, [&](int64_t t, int k0, int k1) {
    kernels.pack(Scalar::f32, from + t * TILE * features, nullptr, features, batch.valid(t), batch.lanes(t), k0, k1,
                 to + t * TILE * features, nullptr);
  });
  return tiles;
}

// tiles to [samples, features]
Tensor linear_unpack(Tensor tiles, int64_t samples, int64_t features) {
  const Batch batch{samples};
  check_tiles(tiles, batch, features, "tiles");
  Tensor x = empty(tiles, {samples, features});
  const float* from = tiles.const_data_ptr<float>();
  float* to = x.mutable_data_ptr<float>();
  const LinearKernels& kernels = linear_kernels();
  for_pieces(batch, features, [&](int64_t t, int k0, int k1) {
    kernels.unpack(Scalar::f32, from + t * TILE * features, batch.lanes(t), batch.valid(t), k0, k1, false,
                   to + t * TILE * features, features);
  });
  return x;
}

Tensor tiled_linear(Tensor x, Tensor values, std::optional<Tensor> bias, Tensor schedule, Tensor t_schedule,
                    int64_t samples, int64_t in_features, int64_t out_features, bool relu, bool, bool) {
  values = torch::stable::contiguous(values);
  if (bias) bias = torch::stable::contiguous(*bias);
  Product p{.batch = {samples}, .in = in_features, .out = out_features, .tiled = true};
  check_tiles(x, p.batch, p.in, "x");
  Tensor y = empty(x, {p.batch.padded() * p.out});
  p.source = x.const_data_ptr();
  p.target = y.mutable_data_ptr();
  p.schedule = read_schedule(schedule, p.out, p.in, values.numel());
  p.weights = in_order(values, p.schedule);
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.relu = relu;
  p.run();
  return y;
}

std::tuple<Tensor, Tensor, Tensor> tiled_linear_backward(Tensor grad, Tensor x, Tensor values, std::optional<Tensor> y,
                                                         Tensor schedule, Tensor t_schedule, int64_t samples,
                                                         int64_t in_features, int64_t out_features, bool gate_x,
                                                         bool need_x, bool need_values, bool need_bias) {
  values = torch::stable::contiguous(values);
  Product p{.batch = {samples}, .in = out_features, .out = in_features, .tiled = true};
  check_tiles(grad, p.batch, out_features, "the gradient");
  check_tiles(x, p.batch, in_features, "x");
  if (y) check_tiles(*y, p.batch, out_features, "y");
  const int64_t nnz = values.numel(), tiles = p.batch.tiles();
  Tensor grad_x = empty(x, {need_x ? x.numel() : 0});
  Tensor gated = empty(grad, {y ? grad.numel() : 0});
  Tensor sums = torch::stable::new_zeros(grad, {need_bias ? tiles * out_features : 0});
  p.source = grad.const_data_ptr();
  p.gate = y ? y->const_data_ptr() : nullptr;
  p.packed = y ? gated.mutable_data_ptr<float>() : nullptr;
  p.column_sums = need_bias ? sums.mutable_data_ptr<float>() : nullptr;
  if (need_x) {
    p.target = grad_x.mutable_data_ptr();
    p.target_gate = gate_x ? x.const_data_ptr<float>() : nullptr;
    p.schedule = read_schedule(t_schedule, in_features, out_features, nnz);
    p.weights = in_order(values, p.schedule);
  }
  p.run();
  Tensor grad_values = empty(values, {0});
  if (need_values)
    grad_values = weight_gradient(p.batch, x.const_data_ptr<float>(), in_features, p.tiles(), out_features, values,
                                  read_schedule(schedule, out_features, in_features, nnz));
  return {grad_x, grad_values, sum_of_tiles(sums, tiles, need_bias ? out_features : 0)};
}

}  // namespace
}  // namespace pst

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&pst::linear_pack));
  m.impl("linear_unpack", TORCH_BOX(&pst::linear_unpack));
  m.impl("tiled_linear", TORCH_BOX(&pst::tiled_linear));
  m.impl("tiled_linear_backward", TORCH_BOX(&pst::tiled_linear_backward));
}
