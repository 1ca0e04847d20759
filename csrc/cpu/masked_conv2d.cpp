// Sparse convolution of ordinary tensors: tiles are packed, multiplied and unpacked one at a time, so that a tile stays
// in L2 from its packing to the last product that reads it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/conv_groups.h"
#include "cpu/kept.h"
#include "cpu/parallel.h"
#include "cpu/pixel_conv2d.h"
#include "cpu/tensors.h"

namespace pst {

constexpr int64_t kScratchFloats = 64 * 1024;  // output rows computed before they are unpacked: 256 KB of a 2 MB L2

static ConvShape conv_shape(const std::vector<int64_t>& x, int64_t o, const std::vector<int64_t>& kernel,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation) {
  return {x[0],      x[1],      x[2],       x[3],       o,           kernel[0],  kernel[1],
          stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

// offsets are int32, in floats
static void check_range(const ConvShape& s) {
  const Plane x = input_plane(s), y = grad_plane(s);
  STD_TORCH_CHECK(std::max(s.c * x.floats(), s.o * y.floats()) < (int64_t(1) << 31),
                  "masked_conv2d: the images are too large for the tiled kernel; use dense weights for this layer");
}

static int64_t rows_at_once(int64_t rows, int64_t cols, int64_t channels) {
  const int64_t fit = kScratchFloats / std::max<int64_t>(1, cols * channels * kLanes) & ~int64_t(1);
  return std::clamp<int64_t>(fit, 2, std::max<int64_t>(2, rows));
}

Tensor masked_conv2d(const Tensor& x_in, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& row_ptr,
                     const Tensor& col, const Tensor&, const Tensor&, const Tensor&, std::vector<int64_t> kernel,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, bool pixels) {
  const ConvShape s = conv_shape({x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)}, row_ptr.numel() - 1, kernel, stride,
                                 padding, dilation);
  const Rows rows{row_ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
  if (pixels) return pixel_conv2d(x_in, s, rows, values.const_data_ptr<float>(), data_or_null(bias));

  const bool last = channels_last(x_in);
  const Tensor x = last ? x_in : torch::stable::contiguous(x_in);
  check_range(s);
  const int64_t oh = s.oh(), ow = s.ow(), tiles = s.tiles(), threads = num_threads();
  const Plane plane = input_plane(s);
  const int64_t tile_floats = s.c * plane.floats();
  const int64_t block = rows_at_once(oh, ow, s.o), blocks = oh ? (oh + block - 1) / block : 0;
  const Plane out_plane{block, ow, 0, 0, 0, 0};

  Tensor y = new_image(x, s.n, s.o, oh, ow, last);
  const bool whole = tiles % threads == 0 || tiles >= 4 * threads;  // a thread runs whole tiles
  float* const tile_base = kept<Use::planes>((whole ? threads : tiles) * tile_floats);

  const ConvWalks walk = ConvWalks::forward(s, rows, values.const_data_ptr<float>(), plane, out_plane);
  const Image in(s.n, s.c, plane, last, is_half(x)), out(s.n, s.o, {oh, ow, 0, 0, 0, 0}, last, is_half(x));
  float* const scratch = kept<Use::outputs>(threads * s.o * out_plane.floats());
  const void* src = x.const_data_ptr();
  void* dst = y.mutable_data_ptr();
  const float* bias_data = data_or_null(bias);

  if (!whole) {
    const int64_t groups = (s.c + kLanes - 1) / kLanes;
    parallel_ranges(tiles * groups, threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / groups, c0 = i % groups * kLanes;
        in.pack(src, t, tile_base + t * tile_floats, c0, std::min(s.c, c0 + kLanes));
      }
    });
  }
  parallel_ranges(tiles * blocks, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    float* buffer = scratch + thread * s.o * out_plane.floats();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / blocks, r0 = i % blocks * block, r1 = std::min(oh, r0 + block);
      float* tile = tile_base + (whole ? thread : t) * tile_floats;
      if (whole && r0 == 0) in.pack(src, t, tile, 0, s.c);
      RowsArgs a = walk.args(0, tile, buffer, out_plane.floats(), bias_data);
      a.y -= r0 * a.y_row;
      a.row0 = int(r0);
      a.row1 = int(r1);
      walk.rows(0, a);
      out.unpack(buffer, out_plane.floats(), out_plane.row(), dst, t, r0, r1);
    }
  }, whole ? blocks : 1);
  return y;
}

// rows of padded input [q0, q1): every phase writes its rows of the block
static void input_grad_rows(const ConvWalks& walks, const float* grad_tile, float* buffer, const Plane& block_plane, int64_t r0,
                            int64_t r1) {
  for (int64_t i = 0; i < walks.size(); ++i) {
    const Walk& w = walks.walk(i);
    if (!w.rows || !w.cols) continue;
    RowsArgs a = walks.args(i, grad_tile, buffer, block_plane.floats(), nullptr);
    a.y -= r0 * block_plane.row();
    // walk row u is image row first + u * row_step
    a.row0 = int(std::max<int64_t>(0, (r0 - w.first + w.row_step - 1) / w.row_step));
    a.row1 = int(std::min(w.rows, std::max<int64_t>(0, (r1 - w.first + w.row_step - 1) / w.row_step)));
    if (a.row0 < a.row1) walks.rows(i, a);
  }
}

std::tuple<Tensor, Tensor> masked_conv2d_backward(const Tensor& grad_in, const std::optional<Tensor>& x_in, const Tensor& values,
                                                  const Tensor& row_ptr, const Tensor& col, const Tensor& t_row_ptr,
                                                  const Tensor& t_col, const Tensor& t_perm, std::vector<int64_t> input_size,
                                                  std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                  bool pixels, bool input_channels_last, bool need_input, bool need_values) {
  const ConvShape s = conv_shape(input_size, row_ptr.numel() - 1, kernel, stride, padding, dilation);
  const Rows rows{row_ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
  const Rows transposed{t_row_ptr.const_data_ptr<int32_t>(), t_col.const_data_ptr<int32_t>()};
  const int64_t nnz = col.numel();
  Tensor dvalues = new_floats(values, {need_values ? nnz : 0});
  if (pixels) {
    if (need_values) pixel_conv2d_weight_grad(grad_in, *x_in, s, rows, dvalues.mutable_data_ptr<float>());
    Tensor dx = need_input ? pixel_conv2d_input_grad(grad_in, s, transposed, t_perm.const_data_ptr<int32_t>(),
                                                     values.const_data_ptr<float>(), input_channels_last)
                           : torch::stable::new_empty(grad_in, {0});
    return {dx, dvalues};
  }

  const bool last = channels_last(grad_in), x_last = need_values && channels_last(*x_in);
  const Tensor grad = last ? grad_in : torch::stable::contiguous(grad_in);
  const Tensor x = !need_values ? grad : x_last ? *x_in : torch::stable::contiguous(*x_in);
  const int64_t oh = s.oh(), ow = s.ow(), tiles = s.tiles(), threads = num_threads();
  const Plane x_plane = input_plane(s), y_plane = need_input ? grad_plane(s) : Plane{oh, ow, 0, 0, 0, 0};
  const int64_t x_floats = s.c * x_plane.floats(), y_floats = s.o * y_plane.floats();
  const int64_t block = rows_at_once(s.h, s.w, s.c), blocks = s.h ? (s.h + block - 1) / block : 0;
  const Plane block_plane{block, s.w, 0, 0, 0, 0};

  Tensor dx = need_input ? new_image(grad, s.n, s.c, s.h, s.w, input_channels_last) : torch::stable::new_empty(grad, {0});
  const bool whole = tiles % threads == 0 || tiles >= 4 * threads;
  float* const grads = kept<Use::grads>((whole ? threads : tiles) * y_floats);
  float* const inputs = kept<Use::planes>(need_values ? (whole ? threads : tiles) * x_floats : 0);
  float* const buffers = kept<Use::outputs>(need_input ? threads * s.c * block_plane.floats() : 0);

  const float* value_data = values.const_data_ptr<float>();
  ConvWalks input_walks, walk;
  if (need_input)
    input_walks = ConvWalks::input_grad(s, transposed, t_perm.const_data_ptr<int32_t>(), value_data, block_plane, y_plane);
  int64_t scratch = 0;
  if (need_values) {
    walk = ConvWalks::forward(s, rows, value_data, x_plane, y_plane);
    scratch = walk.grad_scratch();
  }
  float* const accs = kept<Use::sums>(threads * scratch);
  float* const partial = kept<Use::shared>(need_values ? threads * nnz : 0);
  if (need_values) std::memset(partial, 0, threads * nnz * sizeof(float));

  const bool half = is_half(grad);
  const Image out(s.n, s.o, y_plane, last, half), in(s.n, s.c, {s.h, s.w, 0, 0, 0, 0}, input_channels_last, half);
  const Image input(s.n, s.c, x_plane, x_last, is_half(x));
  const void *src = grad.const_data_ptr(), *x_data = x.const_data_ptr();
  void* dst = dx.mutable_data_ptr();

  const auto input_block = [&](int64_t thread, int64_t t, const float* grad_tile, int64_t b) {
    float* buffer = buffers + thread * s.c * block_plane.floats();
    const int64_t r0 = b * block, r1 = std::min(s.h, r0 + block);
    input_grad_rows(input_walks, grad_tile, buffer, block_plane, r0, r1);
    in.unpack(buffer, block_plane.floats(), block_plane.row(), dst, t, r0, r1);
  };

  if (whole) {
    parallel_ranges(tiles, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      float* tile = grads + thread * y_floats;
      for (int64_t t = begin; t < end; ++t) {
        out.pack(src, t, tile, 0, s.o);
        if (need_input)
          for (int64_t b = 0; b < blocks; ++b) input_block(thread, t, tile, b);
        if (!need_values) continue;
        float* x_tile = inputs + thread * x_floats;
        input.pack(x_data, t, x_tile, 0, s.c);
        walk.weight_grad(x_tile, tile, y_plane, 0, s.o, 0, oh, accs + thread * scratch, partial + thread * nnz);
      }
    });
  } else {
    const int64_t groups = (s.o + kLanes - 1) / kLanes;
    parallel_ranges(tiles * groups, threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / groups, c0 = i % groups * kLanes;
        out.pack(src, t, grads + t * y_floats, c0, std::min(s.o, c0 + kLanes));
      }
    });
    const int64_t x_groups = (s.c + kLanes - 1) / kLanes;
    parallel_ranges(need_values ? tiles * x_groups : 0, threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / x_groups, c0 = i % x_groups * kLanes;
        input.pack(x_data, t, inputs + t * x_floats, c0, std::min(s.c, c0 + kLanes));
      }
    });
    if (need_input)
      parallel_ranges(tiles * blocks, threads, [&](int64_t thread, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) input_block(thread, i / blocks, grads + i / blocks * y_floats, i % blocks);
      });
    if (need_values)
      // rows in pieces of about equal entries
      parallel_ranges(threads, threads, [&](int64_t thread, int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int32_t* ptr = rows.ptr;
          const int64_t out0 = std::lower_bound(ptr, ptr + s.o + 1, nnz * part / threads) - ptr;
          const int64_t out1 = std::lower_bound(ptr, ptr + s.o + 1, nnz * (part + 1) / threads) - ptr;
          for (int64_t t = 0; t < tiles; ++t)
            walk.weight_grad(inputs + t * x_floats, grads + t * y_floats, y_plane, out0, std::min(s.o, out1), 0, oh,
                             accs + thread * scratch, partial + part * nnz);
        }
      });
  }
  if (need_values) sum_parts(partial, threads, nnz, dvalues.mutable_data_ptr<float>());
  return {dx, dvalues};
}

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  m.impl("masked_conv2d_backward", TORCH_BOX(&masked_conv2d_backward));
}

}  // namespace pst
