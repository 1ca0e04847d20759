// The unstructured product on the GPU: pack x feature-major once, multiply, and in the backward pass the same on the
// transposed pattern, and the products at the mask. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "cuda/device.h"
#include "cuda/masked_linear_kernels.h"

namespace pst::cuda {
namespace {

constexpr int MOST_SPLITS = 16;

int64_t samples_of(const Tensor& t) {
  int64_t n = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) n *= t.size(d);
  return n;
}

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
const int32_t* words(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

Scalar scalar_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::BFloat16) return Scalar::bf16;
  if (type == ScalarType::Half) return Scalar::f16;
  STD_TORCH_CHECK(type == ScalarType::Float, "masked_linear takes float32, bfloat16 or float16 activations on the cuda "
                  "backend; use backend='reference'");
  return Scalar::f32;
}

// at most: a grid's second dimension
int64_t tiles_of(int64_t samples, const Tensor& like) {
  const int64_t a_tile = tokens(scalar_of(like)), tiles = (samples + a_tile - 1) / a_tile;
  STD_TORCH_CHECK(tiles <= 65535, "masked_linear on cuda takes a batch of at most ", 65535 * a_tile, " samples, not ", samples);
  return tiles;
}
int64_t packed_size(int64_t samples, int64_t features, const Tensor& like) {
  return tiles_of(samples, like) * features * tokens(scalar_of(like));
}
Tensor empty_tiles(const Tensor& like, int64_t samples, int64_t features) {
  return empty(like, {packed_size(samples, features, like)}, like.scalar_type());
}

// each entry takes 6 bytes of its schedule
int64_t most_entries(const Tensor& schedule) { return schedule.numel() * 2 / 3; }

void product(cudaStream_t stream, const Tensor& tiles, const Tensor& values, const float* bias, const Tensor& schedule,
             int64_t samples, int64_t rows, bool relu, Tensor& y) {
  const int windows = window_tiles(schedule.numel());
  if (windows && scalar_of(y) != Scalar::f32) {
    const int64_t nnz = values.numel(), groups = most_groups(nnz) + 1;  // the last is read, not used
    Tensor weights = empty(values, {groups * GROUP_BYTES / 4});
    STD_CUDA_CHECK(place_weights(scalar_of(y), words(schedule), floats(values), nnz, weights.mutable_data_ptr(), stream));
    STD_CUDA_CHECK(multiply_windows(scalar_of(y), budget_of(y), windows, words(schedule), weights.const_data_ptr(),
                                    tiles.const_data_ptr(), bias, y.mutable_data_ptr(), samples, rows, relu, stream));
    return;
  }
  const int64_t most = most_entries(schedule);
  Tensor memory = empty(values, {(most + WARP) * 2});
  Entry* const entries = reinterpret_cast<Entry*>(floats(memory));
  STD_CUDA_CHECK(gather_entries(words(schedule), floats(values), most, entries, stream));
  STD_CUDA_CHECK(multiply(scalar_of(y), budget_of(y), words(schedule), entries, tiles.const_data_ptr(), bias,
                          y.mutable_data_ptr(), samples, rows, relu, stream));
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor values, std::optional<Tensor> bias, Tensor schedule,
                                   Tensor t_schedule, int64_t out_features, bool relu, bool keep) {
  const OnDevice stream(x);
  x = torch::stable::contiguous(x);
  values = torch::stable::contiguous(values);
  if (bias) bias = torch::stable::contiguous(*bias);
  const int64_t in_features = x.size(x.dim() - 1), samples = samples_of(x);
  check_schedule(schedule, out_features, in_features, values.numel());
  Tensor y = empty(x, with_last(x, out_features), x.scalar_type());
  Tensor tiles = empty_tiles(x, samples, in_features);
  STD_CUDA_CHECK(pack_tiles(scalar_of(x), x.const_data_ptr(), nullptr, samples, in_features, tiles.mutable_data_ptr(),
                            nullptr, stream));
  product(stream, tiles, values, bias ? floats(std::as_const(*bias)) : nullptr, schedule, samples, out_features, relu, y);
  return {y, keep ? tiles : empty(x, {0}, x.scalar_type())};
}

Tensor weight_gradient(cudaStream_t stream, const Tensor& x, const Tensor& dy, const Tensor& values,
                       const Tensor& schedule, int64_t tiles, int64_t rows, int64_t columns) {
  Tensor grad = empty(values, {values.numel()});
  // as many blocks as multiprocessors take the items in turn: enough splits that the last turn is a small part
  const int processors = attribute(x, cudaDevAttrMultiProcessorCount);
  const bool windows = gradient_windows(schedule.numel()) && scalar_of(dy) != Scalar::f32;
  // of windows' cells no more is known here than that a full one has about 3000 weights under a random mask
  const int64_t ranges = chunks_of(rows) * ((columns + 511) / 512);
  const int64_t cells = std::max<int64_t>(1, windows ? values.numel() / 3000 : ranges);
  const int splits = int(std::clamp<int64_t>((4 * processors + cells - 1) / cells, 1,
                                             std::clamp<int64_t>(tiles, 1, MOST_SPLITS)));
  if (windows) {
    Tensor partial = empty(values, {values.numel() * splits});
    STD_CUDA_CHECK(sample_windows(scalar_of(dy), budget_of(x), words(schedule), x.const_data_ptr(), dy.const_data_ptr(), tiles,
                                  values.numel(), splits, processors, floats(partial), floats(grad), stream));
    return grad;
  }
  const int64_t most = most_entries(schedule);
  Tensor partial = empty(values, {most * splits});
  STD_CUDA_CHECK(sample(scalar_of(dy), budget_of(x), words(schedule), x.const_data_ptr(), dy.const_data_ptr(), tiles,
                        splits, processors, floats(partial), stream));
  STD_CUDA_CHECK(sum_splits(words(schedule), floats(partial), most, splits, floats(grad), stream));
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor packed_x, Tensor values, std::optional<Tensor> y,
                                            Tensor schedule, Tensor t_schedule, int64_t in_features, bool need_x,
                                            bool need_values, bool need_bias) {
  const OnDevice stream(grad_y);
  grad_y = torch::stable::contiguous(grad_y);
  values = torch::stable::contiguous(values);
  if (y) y = torch::stable::contiguous(*y);
  const int64_t out_features = grad_y.size(grad_y.dim() - 1), samples = samples_of(grad_y), nnz = values.numel();
  const int64_t tiles = tiles_of(samples, grad_y);
  Tensor dy = empty_tiles(grad_y, samples, out_features);
  Tensor sums = empty(values, {need_bias ? tiles * out_features : 0});
  STD_CUDA_CHECK(pack_tiles(scalar_of(grad_y), grad_y.const_data_ptr(), y ? y->const_data_ptr() : nullptr, samples,
                            out_features, dy.mutable_data_ptr(), need_bias ? floats(sums) : nullptr, stream));
  Tensor grad_x = empty(grad_y, need_x ? with_last(grad_y, in_features) : std::vector<int64_t>{0}, grad_y.scalar_type());
  Tensor grad_bias = empty(values, {need_bias ? out_features : 0});
  Tensor grad_values = empty(values, {0});
  if (need_bias) STD_CUDA_CHECK(sum_tiles(floats(sums), tiles, out_features, floats(grad_bias), stream));
  if (need_x) {
    check_schedule(t_schedule, in_features, out_features, nnz);
    product(stream, dy, values, nullptr, t_schedule, samples, in_features, false, grad_x);
  }
  if (need_values) {
    check_schedule(schedule, out_features, in_features, nnz);
    STD_TORCH_CHECK(packed_x.numel() == packed_size(samples, in_features, grad_y),
                    "the packed input was not kept by forward");
    grad_values = weight_gradient(stream, packed_x, dy, values, schedule, tiles, out_features, in_features);
  }
  return {grad_x, grad_values, grad_bias};
}

std::string cuda_arch() { return "sm_80, sm_90a"; }

}  // namespace
}  // namespace pst::cuda

// there is such an op where the extension was built with CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(pysparse_ticket, m) { m.def("cuda_arch() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CompositeExplicitAutograd, m) {
  m.impl("cuda_arch", TORCH_BOX(&pst::cuda::cuda_arch));
}
STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CUDA, m) {
  m.impl("masked_linear", TORCH_BOX(&pst::cuda::forward));
  m.impl("masked_linear_backward", TORCH_BOX(&pst::cuda::backward));
}
