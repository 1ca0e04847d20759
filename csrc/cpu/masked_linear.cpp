#include "cpu/masked_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/linear_product.h"

#if PST_X86
#include <immintrin.h>
#endif

#define PST_SOURCE "cpu/masked_linear.inl"
#include "cpu/each_isa.inl"

namespace pst {

const LinearKernels& linear_kernels() { return PST_PICK(KERNELS); }

namespace {

Scalar scalar_of(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == ScalarType::Float || s == ScalarType::BFloat16,
                  "masked_linear takes float32 or bfloat16 activations on the cpu backend; use backend='reference'");
  return s == ScalarType::Float ? Scalar::f32 : Scalar::bf16;
}

Batch batch_of(const Tensor& t) { return {t.numel() ? t.numel() / t.size(t.dim() - 1) : 0}; }

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor values, std::optional<Tensor> bias, Tensor schedule,
                                   Tensor t_schedule, int64_t out_features, bool relu, bool keep) {
  x = torch::stable::contiguous(x);
  values = torch::stable::contiguous(values);
  if (bias) bias = torch::stable::contiguous(*bias);
  Product p{.batch = batch_of(x), .type = scalar_of(x), .in = x.size(x.dim() - 1), .out = out_features};
  Tensor y = empty(x, with_last(x, p.out), x.scalar_type());
  if (!p.in) p.batch.samples = p.out ? y.numel() / p.out : 0;
  Tensor packed = empty(x, {keep ? p.batch.padded() * p.in : 0});
  p.source = x.const_data_ptr();
  p.packed = keep ? packed.mutable_data_ptr<float>() : nullptr;
  p.target = y.mutable_data_ptr();
  p.schedule = read_schedule(schedule, p.out, p.in, values.numel());
  p.weights = in_order(values, p.schedule);
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.relu = relu;
  p.run();
  return {y, packed};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor packed_x, Tensor values, std::optional<Tensor> y,
                                            Tensor schedule, Tensor t_schedule, int64_t in_features, bool need_x,
                                            bool need_values, bool need_bias) {
  grad_y = torch::stable::contiguous(grad_y);
  values = torch::stable::contiguous(values);
  if (y) y = torch::stable::contiguous(*y);
  Product p{.batch = batch_of(grad_y), .type = scalar_of(grad_y), .in = grad_y.size(grad_y.dim() - 1), .out = in_features};
  const int64_t out_features = p.in, nnz = values.numel(), tiles = p.batch.tiles();
  std::vector<int64_t> x_shape = need_x ? with_last(grad_y, in_features) : std::vector<int64_t>{0};
  Tensor grad_x = empty(grad_y, x_shape, grad_y.scalar_type());
  Tensor packed = empty(grad_y, {p.batch.padded() * out_features});
  Tensor sums = torch::stable::new_zeros(packed, {need_bias ? tiles * out_features : 0});
  p.source = grad_y.const_data_ptr();
  p.gate = y ? y->const_data_ptr() : nullptr;
  p.packed = packed.mutable_data_ptr<float>();
  p.column_sums = need_bias ? sums.mutable_data_ptr<float>() : nullptr;
  if (need_x) {
    p.target = grad_x.mutable_data_ptr();
    p.schedule = read_schedule(t_schedule, in_features, out_features, nnz);
    p.weights = in_order(values, p.schedule);
  }
  p.run();
  Tensor grad_bias = sum_of_tiles(sums, tiles, need_bias ? out_features : 0);
  Tensor grad_values = empty(values, {0});
  if (need_values) {
    STD_TORCH_CHECK(packed_x.numel() == p.batch.padded() * in_features, "the packed input was not kept by forward");
    grad_values = weight_gradient(p.batch, packed_x.const_data_ptr<float>(), in_features, p.packed, out_features, values,
                                  read_schedule(schedule, out_features, in_features, nnz));
  }
  return {grad_x, grad_values, grad_bias};
}

}  // namespace
}  // namespace pst

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&pst::forward));
  m.impl("masked_linear_backward", TORCH_BOX(&pst::backward));
}
