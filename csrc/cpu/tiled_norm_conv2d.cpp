// A chain cut between convolution and norm: norm, residual add and ReLU of the layer before run where the next convolution
// loads, and their gradients where its input gradient is stored, so that neither makes passes over memory of its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/conv_groups.h"
#include "cpu/parallel.h"
#include "cpu/row_window.h"
#include "cpu/tile_memory.h"
#include "cpu/tiled_chain.h"

namespace pst {

using MaybeTensor = std::optional<Tensor>;

// y * scale + shift is the normalised value, a channel each
struct Affine {
  std::vector<float> scale, shift;
  Affine(const MaybeTensor& stats, const MaybeTensor& weight, const MaybeTensor& bias, int64_t channels)
      : scale(channels), shift(channels) {
    if (!stats) return;
    const float *st = stats->const_data_ptr<float>(), *w = data_or_null(weight), *b = data_or_null(bias);
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = (w ? w[c] : 1.f) * st[channels + c];
      shift[c] = (b ? b[c] : 0.f) - st[c] * scale[c];
    }
  }
};

// The norm, residual add and ReLU before a convolution, on rows of one channel of a tile
struct Input {
  const float *x, *residual;
  const Affine& affine;
  Plane plane;
  int64_t channels;
  bool relu;

  void rows(int64_t t, int64_t c, int64_t r0, int64_t r1, float* hot, int64_t hot_row, float* kept) const {
    const int64_t at = (t * channels + c) * plane.floats() + plane.origin() + r0 * plane.row();
    NormPlane a{};
    a.y = x + at;
    a.g = residual ? residual + at : nullptr;
    a.out = kept ? kept + at : nullptr;
    a.hot = hot;
    a.y_row = a.g_row = a.out_row = plane.row();
    a.hot_row = hot_row;
    a.rows = r1 - r0;
    a.cols = plane.w;
    a.out_halo = plane.left;
    a.scale = affine.scale[c];
    a.shift = affine.shift[c];
    a.relu = relu;
    tile_kernels().norm_act(a);
  }
};

static void clear_rows_outside(float* plane, const Plane& p) {
  std::memset(plane, 0, p.top * p.row() * sizeof(float));
  std::memset(plane + (p.top + p.h) * p.row(), 0, p.bottom * p.row() * sizeof(float));
}

// Output rows [out0, out1) read image rows [lo, hi)
struct Band {
  int64_t out0, out1, lo, hi;
};

static int64_t capacity(const std::vector<Band>& bands) {
  int64_t most = 0;
  for (const Band& b : bands) most = std::max(most, b.hi - b.lo);
  return most;
}

// image rows that output rows [r0, r1) read
static Band reads(const ConvShape& s, int64_t r0, int64_t r1) {
  return {r0, r1, r0 * s.sh - s.ph, (r1 - 1) * s.sh - s.ph + (s.kh - 1) * s.dh + 1};
}

// Every image row is in some band
static std::vector<Band> forward_bands(const ConvShape& s, int64_t row_floats) {
  int64_t step = 4;
  while (step < s.oh() && ((step + 3) * s.sh + (s.kh - 1) * s.dh + 1) * row_floats <= kWindowFloats) step += 4;
  std::vector<Band> bands;
  for (int64_t r = 0; r < s.oh(); r += step) {
    Band b = reads(s, r, std::min(r + step, s.oh()));
    if (r) b.lo = std::min(b.lo, bands.back().hi);
    bands.push_back(b);
  }
  bands.back().hi = std::max(bands.back().hi, s.h);
  return bands;
}

// Rows [x0, x1) of the input gradient read output rows [grad.lo, grad.hi), of which [grad.out0, grad.out1) are new;
// the weight gradient of the new ones reads image rows [image_lo, image_hi)
struct GradBand {
  int64_t x0, x1;
  Band grad, image;
};

static std::vector<GradBand> grad_bands(const ConvShape& s, const Plane& g, int64_t x_floats, int64_t g_floats) {
  const int64_t reach = (s.kh - 1) * s.dh;
  if (s.sh != 1 || s.ph > reach) return {{0, s.h, {0, s.oh(), -g.top, s.oh() + g.bottom}, reads(s, 0, s.oh())}};
  int64_t step = 4;
  while (step < s.h && (step + 4 + reach) * (x_floats + g_floats) <= 2 * kWindowFloats) step += 4;
  std::vector<GradBand> bands;
  for (int64_t x0 = 0, done = 0; x0 < s.h; x0 += step) {
    const int64_t x1 = std::min(x0 + step, s.h), hi = x1 + s.ph, next = x1 == s.h ? s.oh() : std::min(hi, s.oh());
    bands.push_back({x0, x1, {done, next, x0 + s.ph - reach, hi}, reads(s, done, next)});
    done = next;
  }
  return bands;
}

// -> y, stats [3, O] of y's own norm, the input behind norm, residual and ReLU (empty unless keep)
std::tuple<Tensor, Tensor, Tensor> tiled_norm_conv2d(
    const Tensor& x, const MaybeTensor& stats, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    bool relu, bool keep, const Tensor& values, const Tensor& row_ptr, const Tensor& col, const MaybeTensor& mean,
    const MaybeTensor& var, int64_t n, int64_t halo, std::vector<int64_t> kernel, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, double eps) {
  const ConvShape s = shape_of(x, halo, n, row_ptr.numel() - 1, kernel, stride, padding, dilation);
  const int64_t tiles = s.tiles(), threads = num_threads();
  const Plane x_plane = plane_of(x, halo), y_plane{s.oh(), s.ow(), halo, halo, halo, halo};
  Tensor y = new_tiles(x, {tiles, s.o, y_plane.hp(), y_plane.wp(), kLanes});
  Tensor own = new_floats(x, {3, s.o});
  Tensor z = keep && stats ? new_tiles(x, {tiles, s.c, x_plane.hp(), x_plane.wp(), kLanes}) : new_floats(x, {0});

  const Affine affine(stats, weight, bias, s.c);
  const Input input{x.const_data_ptr<float>(), data_or_null(residual), affine, x_plane, s.c, relu};
  const std::vector<Band> bands = stats ? forward_bands(s, s.c * x_plane.row()) : std::vector<Band>{reads(s, 0, s.oh())};
  const Plane window_plane{capacity(bands), x_plane.w, 0, halo, 0, halo};
  const Scratch windows(stats ? threads * s.c * window_plane.floats() : 0);
  const Scratch sums(mean ? 0 : tiles * s.o * 3 * kLanes);
  const Rows rows{row_ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
  const ConvWalks walk = ConvWalks::forward(s, rows, values.const_data_ptr<float>(), stats ? window_plane : x_plane, y_plane);
  const int64_t x_floats = s.c * x_plane.floats(), y_floats = s.o * y_plane.floats();
  float *dst = y.mutable_data_ptr<float>(), *kept = keep && stats ? z.mutable_data_ptr<float>() : nullptr;

  // whole tiles to a thread when they share out evenly, else output channels of a tile too
  const int64_t parts = parts_of_tile(s.o, tiles, threads);
  parallel_ranges(tiles * parts, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    std::optional<RowWindow> window;
    if (stats) window.emplace(windows.get() + thread * s.c * window_plane.floats(), window_plane, s.c, s.h);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / parts, part = i % parts;
      float* z_out = part == 0 ? kept : nullptr;
      if (window) window->restart();
      if (z_out)
        for (int64_t c = 0; c < s.c; ++c) clear_rows_outside(z_out + t * x_floats + c * x_plane.floats(), x_plane);
      for (const Band& band : bands) {
        if (window)
          window->move(band.lo, band.hi, [&](int64_t c, int64_t r0, int64_t r1, float* at) {
            input.rows(t, c, r0, r1, at, window_plane.row(), z_out);
          });
        RowsArgs a = walk.args(0, window ? window->image() : input.x + t * x_floats, dst + t * y_floats, y_plane.floats(), nullptr);
        a.out0 = int(part_begin(s.o, part, parts));
        a.out1 = int(part_begin(s.o, part + 1, parts));
        a.row0 = int(band.out0);
        a.row1 = int(band.out1);
        if (!mean) a.moments = sums.get() + t * s.o * 3 * kLanes;
        a.fresh = true;
        walk.rows(0, a);
      }
    }
  });
  float* st = own.mutable_data_ptr<float>();
  if (mean)
    given_moments(mean->const_data_ptr<float>(), var->const_data_ptr<float>(), s.o, eps, st);
  else
    combine_moments(sums.get(), tiles, s.o, n, s.oh() * s.ow(), eps, st);
  return {y, own, z};
}

// -> gradient of x (plus pass; behind the norm's ReLU where there is a norm), terms and dnorm of that norm, gradient of values
std::tuple<Tensor, Tensor, Tensor, Tensor> tiled_norm_conv2d_backward(
    const Tensor& grad, const Tensor& grad_terms, const MaybeTensor& pass, const Tensor& y, const Tensor& y_stats,
    const Tensor& x, const MaybeTensor& z, const MaybeTensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
    bool relu, bool batch_stats, const Tensor& values, const Tensor& row_ptr, const Tensor& col, const Tensor& t_row_ptr,
    const Tensor& t_col, const Tensor& t_perm, int64_t n, int64_t halo, std::vector<int64_t> kernel,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, bool need_x, bool need_values) {
  const ConvShape s = shape_of(x, halo, n, row_ptr.numel() - 1, kernel, stride, padding, dilation);
  const int64_t tiles = s.tiles(), threads = num_threads(), nnz = col.numel();
  const Plane x_plane = plane_of(x, halo), y_plane = plane_of(y, halo), g_halo = grad_plane(s);
  const int64_t x_floats = s.c * x_plane.floats(), y_floats = s.o * y_plane.floats();
  Tensor dx = need_x ? new_tiles(x, {tiles, s.c, x_plane.hp(), x_plane.wp(), kLanes}) : new_floats(x, {0});
  Tensor terms = new_floats(x, {3, s.c}), dnorm = new_floats(x, {2, s.c}), dvalues = new_floats(x, {need_values ? nnz : 0});

  // the convolution's input: stored, or made again
  const bool again = stats && !z;
  const Affine affine(stats, weight, bias, s.c);
  const Input input{x.const_data_ptr<float>(), nullptr, affine, x_plane, s.c, relu};
  const float* stored = z ? z->const_data_ptr<float>() : input.x;
  const int64_t g_row = (g_halo.left + g_halo.w + g_halo.right) * kLanes;
  const std::vector<GradBand> bands = grad_bands(s, g_halo, again && need_values ? s.c * x_plane.row() : 0, s.o * g_row);
  int64_t g_rows = 0, z_rows = 0;
  for (const GradBand& b : bands) {
    g_rows = std::max(g_rows, b.grad.hi - b.grad.lo);
    z_rows = std::max(z_rows, b.image.hi - b.image.lo);
  }
  const Plane g_plane{g_rows, g_halo.w, 0, g_halo.left, 0, g_halo.right}, z_plane{z_rows, x_plane.w, 0, halo, 0, halo};

  const Rows rows{row_ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
  const Rows transposed{t_row_ptr.const_data_ptr<int32_t>(), t_col.const_data_ptr<int32_t>()};
  const float* value_data = values.const_data_ptr<float>();
  ConvWalks input_walks, walk;
  if (need_x) input_walks = ConvWalks::input_grad(s, transposed, t_perm.const_data_ptr<int32_t>(), value_data, x_plane, g_plane);
  int64_t room = 0;
  if (need_values) {
    walk = ConvWalks::forward(s, rows, value_data, again ? z_plane : x_plane, g_plane);
    room = walk.grad_scratch();
  }
  const int64_t window_floats = s.o * g_plane.floats(), image_floats = again && need_values ? s.c * z_plane.floats() : 0;
  const Scratch windows(threads * (window_floats + image_floats)), accs(threads * room);
  const Scratch partial(need_values ? threads * nnz : 0), sums(tiles * s.c * 2 * kLanes);
  if (need_values) std::memset(partial.get(), 0, threads * nnz * sizeof(float));
  std::memset(sums.get(), 0, tiles * s.c * 2 * kLanes * sizeof(float));

  const float *g = grad.const_data_ptr<float>(), *raw = y.const_data_ptr<float>(), *own = y_stats.const_data_ptr<float>();
  const float *factors = grad_terms.const_data_ptr<float>(), *extra = data_or_null(pass);
  const float* norm = data_or_null(stats);
  float* dst = need_x ? dx.mutable_data_ptr<float>() : nullptr;
  const TileKernels& kernels = tile_kernels();
  parallel_ranges(need_x || need_values ? tiles : 0, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    float* scratch = windows.get() + thread * (window_floats + image_floats);
    RowWindow grads(scratch, g_plane, s.o, s.oh());
    std::optional<RowWindow> images;
    if (image_floats) images.emplace(scratch + window_floats, z_plane, s.c, s.h);
    for (int64_t t = end; t-- > begin;) {
      grads.restart();
      if (images) images->restart();
      for (const GradBand& band : bands) {
        grads.move(band.grad.lo, band.grad.hi, [&](int64_t o, int64_t r0, int64_t r1, float* at) {
          const int64_t from = t * y_floats + o * y_plane.floats() + y_plane.origin() + r0 * y_plane.row();
          NormPlane a{};
          a.g = g + from;
          a.y = raw + from;
          a.y_row = a.g_row = y_plane.row();
          a.out = at;
          a.out_row = g_plane.row();
          a.rows = r1 - r0;
          a.cols = y_plane.w;
          a.scale = factors[o];
          a.constant = factors[s.o + o];
          a.slope = factors[2 * s.o + o];
          a.mean = own[o];
          a.lanes = lanes_of(n, t);
          kernels.norm_grad(a);
        });
        if (need_values && band.grad.out1 > band.grad.out0) {
          if (images)
            images->move(band.image.lo, band.image.hi, [&](int64_t c, int64_t r0, int64_t r1, float* at) {
              input.rows(t, c, r0, r1, at, z_plane.row(), nullptr);
            });
          walk.weight_grad(images ? images->image() : stored + t * x_floats, grads.image(), g_plane, 0, s.o, band.grad.out0,
                           band.grad.out1, accs.get() + thread * room, partial.get() + thread * nnz);
        }
        for (int64_t i = 0; need_x && i < input_walks.size(); ++i) {
          const Walk& phase = input_walks.walk(i);
          if (!phase.rows || !phase.cols) continue;
          RowsArgs a = input_walks.args(i, grads.image(), dst + t * x_floats, x_plane.floats(), nullptr);
          if (bands.size() > 1) {
            a.row0 = int(band.x0);
            a.row1 = int(band.x1);
          }
          const int64_t at = t * x_floats + phase.y_origin;
          if (extra) a.start = extra + at;
          if (norm) {
            a.gate_y = input.x + at;
            a.gate_z = z ? stored + at : nullptr;
            a.gate_scale = affine.scale.data();
            a.gate_shift = affine.shift.data();
            a.gate_mean = norm;
            a.gate_sums = sums.get() + t * s.c * 2 * kLanes;
            a.relu = relu;
          }
          input_walks.rows(i, a);
        }
      }
    }
  });
  if (need_values) sum_parts(partial.get(), std::min(threads, tiles), nnz, dvalues.mutable_data_ptr<float>());
  if (norm)
    norm_terms(sums.get(), s.c, n, s.h * s.w, norm, data_or_null(weight), batch_stats, dnorm.mutable_data_ptr<float>(),
               terms.mutable_data_ptr<float>());
  return {dx, terms, dnorm, dvalues};
}

// act(norm(y) + residual), where the chain ends or something else reads it
Tensor tiled_norm(const Tensor& y, const Tensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
                  const MaybeTensor& residual, int64_t halo, bool relu) {
  const Plane plane = plane_of(y, halo);
  const int64_t channels = y.size(1);
  Tensor z = new_tiles(y, {y.size(0), channels, plane.hp(), plane.wp(), kLanes});
  float* out = z.mutable_data_ptr<float>();
  const Affine affine(stats, weight, bias, channels);
  const Input input{y.const_data_ptr<float>(), data_or_null(residual), affine, plane, channels, relu};
  parallel_ranges(y.size(0) * channels, num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) {
      clear_rows_outside(out + i * plane.floats(), plane);
      input.rows(i / channels, i % channels, 0, plane.h, nullptr, 0, out);
    }
  });
  return z;
}

// -> the gradient behind the ReLU (empty without one), terms and dnorm
std::tuple<Tensor, Tensor, Tensor> tiled_norm_backward(const Tensor& grad, const Tensor& y, const MaybeTensor& z,
                                                       const Tensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
                                                       int64_t n, int64_t halo, bool relu, bool batch_stats) {
  const Plane plane = plane_of(y, halo);
  const int64_t tiles = y.size(0), channels = y.size(1);
  Tensor gated = relu ? new_tiles(y, {tiles, channels, plane.hp(), plane.wp(), kLanes}) : new_floats(y, {0});
  Tensor terms = new_floats(y, {3, channels}), dnorm = new_floats(y, {2, channels});
  const Scratch sums(tiles * channels * 2 * kLanes);
  const Affine affine(stats, weight, bias, channels);
  const float *g = grad.const_data_ptr<float>(), *raw = y.const_data_ptr<float>(), *out = data_or_null(z);
  const float* st = stats.const_data_ptr<float>();
  float* dst = relu ? gated.mutable_data_ptr<float>() : nullptr;
  parallel_ranges(tiles * channels, num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % channels, at = i * plane.floats() + plane.origin();
      NormPlane a{};
      a.g = g + at;
      a.y = raw + at;
      a.z = out ? out + at : nullptr;
      a.out = dst ? dst + at : nullptr;
      a.y_row = a.g_row = a.out_row = plane.row();
      a.rows = plane.h;
      a.cols = plane.w;
      a.scale = affine.scale[c];
      a.shift = affine.shift[c];
      a.mean = st[c];
      a.sums = sums.get() + i * 2 * kLanes;
      a.relu = relu;
      tile_kernels().norm_sums(a);
    }
  }, channels);
  norm_terms(sums.get(), channels, n, plane.h * plane.w, st, data_or_null(weight), batch_stats,
             dnorm.mutable_data_ptr<float>(), terms.mutable_data_ptr<float>());
  return {gated, terms, dnorm};
}

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CPU, m) {
  m.impl("tiled_norm_conv2d", TORCH_BOX(&tiled_norm_conv2d));
  m.impl("tiled_norm_conv2d_backward", TORCH_BOX(&tiled_norm_conv2d_backward));
  m.impl("tiled_norm", TORCH_BOX(&tiled_norm));
  m.impl("tiled_norm_backward", TORCH_BOX(&tiled_norm_backward));
}

}  // namespace pst
