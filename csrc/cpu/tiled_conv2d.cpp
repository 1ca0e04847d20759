// Convolution, batch norm, residual add and ReLU on tensors that stay batch-tiled from layer to layer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/conv_groups.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "cpu/tile_memory.h"
#include "cpu/tiled_chain.h"

namespace pst {

// -> z, y (the convolution alone, no halo), stats [3, O]: mean, 1 / sqrt(var + eps), biased variance
std::tuple<Tensor, Tensor, Tensor> tiled_conv2d(const Tensor& x, const Tensor& values, const Tensor& row_ptr, const Tensor& col,
                                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                                const std::optional<Tensor>& residual, int64_t n, int64_t halo,
                                                std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                                std::vector<int64_t> padding, std::vector<int64_t> dilation, bool norm,
                                                double eps, bool relu) {
  const ConvShape s = shape_of(x, halo, n, row_ptr.numel() - 1, kernel, stride, padding, dilation);
  const int64_t oh = s.oh(), ow = s.ow(), tiles = s.tiles(), threads = num_threads();
  const Plane x_plane = plane_of(x, halo), y_plane{oh, ow, 0, 0, 0, 0}, z_plane{oh, ow, halo, halo, halo, halo};
  Tensor y = new_tiles(x, {norm ? tiles : 0, s.o, oh, ow, kLanes});
  Tensor z = new_tiles(x, {tiles, s.o, z_plane.hp(), z_plane.wp(), kLanes});
  Tensor stats = new_floats(x, {3, s.o});
  const bool batch_stats = norm && !mean;
  const Scratch sums(batch_stats ? tiles * s.o * 3 * kLanes : 0);

  const Rows rows{row_ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
  const ConvWalks walk = ConvWalks::forward(s, rows, values.const_data_ptr<float>(), x_plane, norm ? y_plane : z_plane);
  const float* src = x.const_data_ptr<float>();
  // without a norm the convolution goes straight into the output
  const Plane& raw_plane = norm ? y_plane : z_plane;
  float *dst = z.mutable_data_ptr<float>(), *raw = norm ? y.mutable_data_ptr<float>() : dst;
  const TileKernels& kernels = tile_kernels();
  const int64_t x_floats = s.c * x_plane.floats(), y_floats = s.o * raw_plane.floats(), z_floats = s.o * z_plane.floats();
  const float *w = data_or_null(weight), *b = data_or_null(bias), *res = data_or_null(residual);

  // whole tiles to a thread when they share out evenly, else output channels of a tile too
  const int64_t parts = parts_of_tile(s.o, tiles, threads);
  const auto part_of = [&](int64_t i) {
    return std::pair{part_begin(s.o, i % parts, parts), part_begin(s.o, i % parts + 1, parts)};
  };
  parallel_ranges(tiles * parts, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / parts;
      const auto [o0, o1] = part_of(i);
      RowsArgs a = walk.args(0, src + t * x_floats, raw + t * y_floats, raw_plane.floats(), norm ? nullptr : b);
      a.out0 = int(o0);
      a.out1 = int(o1);
      if (batch_stats) a.moments = sums.get() + t * s.o * 3 * kLanes;
      a.fresh = true;
      walk.rows(0, a);
      if (!norm)
        for (int64_t o = o0; o < o1; ++o) clear_halo(dst + t * z_floats + o * z_plane.floats(), z_plane);
    }
  });

  float* st = stats.mutable_data_ptr<float>();
  if (batch_stats) {
    combine_moments(sums.get(), tiles, s.o, n, oh * ow, eps, st);
  } else if (!norm) {
    std::fill(st, st + s.o, 0.f);
    std::fill(st + s.o, st + 3 * s.o, 1.f);
    if (!relu && !res) return {z, y, stats};
  } else {
    given_moments(mean->const_data_ptr<float>(), var->const_data_ptr<float>(), s.o, eps, st);
  }

  parallel_ranges(tiles * parts, threads, [&](int64_t, int64_t begin, int64_t end) {
    // last tile first: it is still in L2
    for (int64_t i = end; i-- > begin;) {
      const int64_t t = i / parts;
      const auto [o0, o1] = part_of(i);
      for (int64_t o = o0; o < o1; ++o) {
        float* out = dst + t * z_floats + o * z_plane.floats();
        NormPlane a{};
        a.y = raw + t * y_floats + o * raw_plane.floats() + raw_plane.origin();
        a.y_row = raw_plane.row();
        a.g = res ? res + t * z_floats + o * z_plane.floats() + z_plane.origin() : nullptr;
        a.out = out + z_plane.origin();
        a.g_row = a.out_row = z_plane.row();
        a.rows = oh;
        a.cols = ow;
        a.out_halo = halo;
        a.scale = norm ? (w ? w[o] : 1.f) * st[s.o + o] : 1.f;
        a.shift = norm ? (b ? b[o] : 0.f) - st[o] * a.scale : 0.f;
        a.relu = relu;
        std::memset(out, 0, halo * z_plane.row() * sizeof(float));
        kernels.norm_act(a);
        std::memset(out + (halo + oh) * z_plane.row(), 0, halo * z_plane.row() * sizeof(float));
      }
    }
  });
  return {z, y, stats};
}

// -> gradients of x (plus pass, if given), values, norm weight [O], norm bias [O], residual; empty where not needed
std::tuple<Tensor, Tensor, Tensor, Tensor> tiled_conv2d_backward(
    const Tensor& grad, const std::optional<Tensor>& pass, const Tensor& x, const Tensor& y, const std::optional<Tensor>& z,
    const Tensor& stats, const Tensor& values, const Tensor& row_ptr, const Tensor& col, const Tensor& t_row_ptr,
    const Tensor& t_col, const Tensor& t_perm, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t n,
    int64_t halo, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, bool norm, bool batch_stats, bool relu, bool need_x, bool need_values, bool need_norm,
    bool need_residual) {
  const ConvShape s = shape_of(x, halo, n, row_ptr.numel() - 1, kernel, stride, padding, dilation);
  const int64_t oh = s.oh(), ow = s.ow(), tiles = s.tiles(), threads = num_threads(), nnz = col.numel();
  const Plane x_plane = plane_of(x, halo), y_plane{oh, ow, 0, 0, 0, 0}, z_plane{oh, ow, halo, halo, halo, halo};
  const Plane g_plane = need_x ? grad_plane(s) : y_plane;
  const int64_t x_floats = s.c * x_plane.floats(), y_floats = s.o * y_plane.floats(), z_floats = s.o * z_plane.floats(),
                g_floats = s.o * g_plane.floats();
  Tensor dx = need_x ? new_tiles(x, {tiles, s.c, x_plane.hp(), x_plane.wp(), kLanes}) : new_floats(x, {0});
  Tensor dvalues = new_floats(x, {need_values ? nnz : 0});
  Tensor dnorm = new_floats(x, {2, s.o});
  Tensor dres = need_residual ? new_tiles(x, {tiles, s.o, z_plane.hp(), z_plane.wp(), kLanes}) : new_floats(x, {0});

  const TileKernels& kernels = tile_kernels();
  const float *st = stats.const_data_ptr<float>(), *w = data_or_null(weight), *b = data_or_null(bias);
  const float *raw = y.const_data_ptr<float>(), *g = grad.const_data_ptr<float>(), *out = data_or_null(z);
  float* gated = need_residual ? dres.mutable_data_ptr<float>() : nullptr;

  const auto plane_args = [&](int64_t t, int64_t o) {
    NormPlane a{};
    a.g = g + t * z_floats + o * z_plane.floats() + z_plane.origin();
    // without a norm nothing depends on y
    a.y = norm ? raw + t * y_floats + o * y_plane.floats() : a.g;
    a.y_row = norm ? y_plane.row() : z_plane.row();
    a.z = out ? out + t * z_floats + o * z_plane.floats() + z_plane.origin() : nullptr;
    a.g_row = z_plane.row();
    a.rows = oh;
    a.cols = ow;
    a.scale = (w ? w[o] : 1.f) * st[s.o + o];
    a.shift = (b ? b[o] : 0.f) - st[o] * a.scale;
    a.mean = st[o];
    a.relu = relu;
    a.lanes = lanes_of(n, t);
    return a;
  };

  // pass 1: sums of the gated gradient, and the gated gradient itself where the residual wants it
  const Scratch sums(tiles * s.o * 2 * kLanes);
  const bool reduce = batch_stats || need_norm || need_residual;
  if (!reduce) std::memset(sums.get(), 0, tiles * s.o * 2 * kLanes * sizeof(float));
  parallel_ranges(reduce ? tiles * s.o : 0, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      NormPlane a = plane_args(i / s.o, i % s.o);
      a.sums = sums.get() + i * 2 * kLanes;
      if (gated) {
        float* plane = gated + i * z_plane.floats();
        std::memset(plane, 0, halo * z_plane.row() * sizeof(float));
        std::memset(plane + (halo + oh) * z_plane.row(), 0, halo * z_plane.row() * sizeof(float));
        a.out = plane + z_plane.origin();
        a.out_row = z_plane.row();
        a.out_halo = halo;
      }
      kernels.norm_sums(a);
    }
  }, s.o);
  std::vector<float> terms(3 * s.o);
  norm_terms(sums.get(), s.o, n, oh * ow, st, w, batch_stats, dnorm.mutable_data_ptr<float>(), terms.data());

  // pass 2, a tile at a time: gradient of y in a halo, input gradient, weight gradient
  ConvWalks input_walks, walk;
  const Rows rows{row_ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
  const Rows transposed{t_row_ptr.const_data_ptr<int32_t>(), t_col.const_data_ptr<int32_t>()};
  const float* value_data = values.const_data_ptr<float>();
  if (need_x) input_walks = ConvWalks::input_grad(s, transposed, t_perm.const_data_ptr<int32_t>(), value_data, x_plane, g_plane);
  int64_t scratch = 0;
  if (need_values) {
    walk = ConvWalks::forward(s, rows, value_data, x_plane, g_plane);
    scratch = walk.grad_scratch();
  }
  const Scratch grads(threads * g_floats), accs(threads * scratch);
  const Scratch partial(need_values ? threads * nnz : 0);
  if (need_values) std::memset(partial.get(), 0, threads * nnz * sizeof(float));
  const float *in = x.const_data_ptr<float>(), *extra = data_or_null(pass);
  float* dst = need_x ? dx.mutable_data_ptr<float>() : nullptr;
  if (need_x || need_values)
    parallel_ranges(tiles, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      float* tile = grads.get() + thread * g_floats;
      // norm_grad writes the inside alone
      for (int64_t o = 0; o < s.o; ++o) clear_halo(tile + o * g_plane.floats(), g_plane);
      for (int64_t t = end; t-- > begin;) {
        for (int64_t o = 0; o < s.o; ++o) {
          NormPlane a = plane_args(t, o);
          if (gated) {
            a.g = gated + t * z_floats + o * z_plane.floats() + z_plane.origin();
            a.relu = false;
          }
          a.out = tile + o * g_plane.floats() + g_plane.origin();
          a.out_row = g_plane.row();
          a.constant = terms[s.o + o];
          a.slope = terms[2 * s.o + o];
          kernels.norm_grad(a);
        }
        if (need_x) {
          float* to = dst + t * x_floats;
          for (int64_t c = 0; c < s.c; ++c) clear_halo(to + c * x_plane.floats(), x_plane);
          for (int64_t i = 0; i < input_walks.size(); ++i) {
            const Walk& phase = input_walks.walk(i);
            if (!phase.rows || !phase.cols) continue;
            RowsArgs a = input_walks.args(i, tile, to, x_plane.floats(), nullptr);
            if (extra) a.start = extra + t * x_floats + phase.y_origin;
            input_walks.rows(i, a);
          }
        }
        if (need_values)
          walk.weight_grad(in + t * x_floats, tile, g_plane, 0, s.o, 0, oh, accs.get() + thread * scratch,
                           partial.get() + thread * nnz);
      }
    });
  if (need_values) sum_parts(partial.get(), threads, nnz, dvalues.mutable_data_ptr<float>());
  return {dx, dvalues, dnorm, dres};
}

Tensor tile_pack(const Tensor& x_in, int64_t halo) {
  const bool last = channels_last(x_in);
  const Tensor x = last ? x_in : torch::stable::contiguous(x_in);
  const int64_t n = x.size(0), c = x.size(1), tiles = (n + kLanes - 1) / kLanes;
  const Plane plane{x.size(2), x.size(3), halo, halo, halo, halo};
  Tensor out = new_tiles(x, {tiles, c, plane.hp(), plane.wp(), kLanes});
  const Image image(n, c, plane, last, false);
  const int64_t groups = (c + kLanes - 1) / kLanes;
  const float* src = x.const_data_ptr<float>();
  float* dst = out.mutable_data_ptr<float>();
  parallel_ranges(tiles * groups, num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / groups, c0 = i % groups * kLanes;
      image.pack(src, t, dst + t * c * plane.floats(), c0, std::min(c, c0 + kLanes));
    }
  });
  return out;
}

Tensor tile_unpack(const Tensor& t, int64_t n, int64_t halo, bool last) {
  const Plane plane = plane_of(t, halo);
  const int64_t c = t.size(1);
  Tensor out = new_image(t, n, c, plane.h, plane.w, last);
  const Image image(n, c, {plane.h, plane.w, 0, 0, 0, 0}, last, false);
  const float* src = t.const_data_ptr<float>();
  float* dst = out.mutable_data_ptr<float>();
  parallel_ranges(t.size(0), num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      image.unpack(src + i * c * plane.floats() + plane.origin(), plane.floats(), plane.row(), dst, i, 0, plane.h);
  });
  return out;
}

// mean over pixels: [tiles, C, Hp, Wp, 16] -> [n, C]
Tensor tiled_mean(const Tensor& t, int64_t n, int64_t halo) {
  const Plane plane = plane_of(t, halo);
  const int64_t c = t.size(1);
  Tensor out = new_floats(t, {n, c});
  const float* src = t.const_data_ptr<float>();
  float* dst = out.mutable_data_ptr<float>();
  const float scale = 1.f / float(plane.h * plane.w);
  parallel_ranges(t.size(0) * c, num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum[kLanes];
      tile_kernels().plane_sum(src + i * plane.floats() + plane.origin(), plane.row(), plane.h, plane.w, sum);
      for (int l = 0; l < lanes_of(n, i / c); ++l) dst[(i / c * kLanes + l) * c + i % c] = sum[l] * scale;
    }
  });
  return out;
}

Tensor tiled_mean_backward(const Tensor& grad_in, int64_t h, int64_t w, int64_t halo) {
  const Tensor grad = torch::stable::contiguous(grad_in);
  const int64_t n = grad.size(0), c = grad.size(1), tiles = (n + kLanes - 1) / kLanes;
  const Plane plane{h, w, halo, halo, halo, halo};
  Tensor out = new_tiles(grad, {tiles, c, plane.hp(), plane.wp(), kLanes});
  const float* src = grad.const_data_ptr<float>();
  float* dst = out.mutable_data_ptr<float>();
  const float scale = 1.f / float(h * w);
  parallel_ranges(tiles * c, num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float line[kLanes] = {};
      for (int l = 0; l < lanes_of(n, i / c); ++l) line[l] = src[(i / c * kLanes + l) * c + i % c] * scale;
      float* to = dst + i * plane.floats();
      clear_halo(to, plane);
      for (int64_t r = 0; r < h; ++r)
        for (int64_t p = 0; p < w; ++p) std::memcpy(to + plane.origin() + r * plane.row() + p * kLanes, line, sizeof line);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CPU, m) {
  m.impl("tiled_conv2d", TORCH_BOX(&tiled_conv2d));
  m.impl("tiled_conv2d_backward", TORCH_BOX(&tiled_conv2d_backward));
  m.impl("tile_pack", TORCH_BOX(&tile_pack));
  m.impl("tile_unpack", TORCH_BOX(&tile_unpack));
  m.impl("tiled_mean", TORCH_BOX(&tiled_mean));
  m.impl("tiled_mean_backward", TORCH_BOX(&tiled_mean_backward));
}

}  // namespace pst
