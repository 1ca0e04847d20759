// Tensors of the convolution ops
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace pst {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor new_floats(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

inline bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

// of the same type
inline Tensor new_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool last) {
  const std::vector<int64_t> size{n, c, h, w};
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline const float* data_or_null(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// the strides say channels_last, and not contiguous as well
inline bool channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  const auto size = t.sizes(), stride = t.strides();
  int64_t expect = 1;
  for (int d : {1, 3, 2, 0}) {
    if (size[d] != 1 && stride[d] != expect) return false;
    expect *= size[d];
  }
  return true;
}

}  // namespace pst
