#include "cpu/pixel_conv2d.h"

#include "cpu/half.h"
#include "cpu/kept.h"
#include "cpu/parallel.h"
#include "cpu/pixel_plan.h"

namespace pst {

// partial sums of the weight gradient that a thread holds until its last image: 1 MB of a 2 MB L2
constexpr int64_t kHeldFloats = 256 * 1024;

namespace {
struct Item {
  int64_t group, band, part;
  Item(const PixelPlan& p, int64_t i) : group(i / p.parts / p.bands), band(i / p.parts % p.bands), part(i % p.parts) {}
};
}  // namespace

static Tensor as_channels_last(const Tensor& t) {
  Tensor out = new_image(t, t.size(0), t.size(1), t.size(2), t.size(3), true);
  torch::stable::copy_(out, t);
  return out;
}

// the planes of an item: packed unless this thread's last item had the same, or the tensor itself
static const float* planes_of(const PixelPlan& p, const Item& item, int64_t& packed, const void* src, bool half, float* buffer) {
  if (p.direct) return static_cast<const float*>(src) + item.group * p.group * p.sample_floats + item.band * p.band * p.w;
  const int64_t wanted = item.group * p.bands + item.band;
  const bool clean = packed >= 0 && p.bands == 1;
  if (packed != wanted) p.pack(src, half, item.group, item.band, clean, buffer);
  packed = wanted;
  return buffer;
}

static int64_t plane_floats(const PixelPlan& p) { return p.direct ? 0 : p.group * p.sample_floats + 64; }

static PixelArgs walk_args(const PixelPlan& p, const PixelWalk& w, const Item& item, const float* planes) {
  PixelArgs a{};
  a.x = planes;
  a.x_sample = p.sample_floats;
  a.samples = p.samples(item.group);
  a.pixels = std::max<int64_t>(0, std::min(w.rows, (item.band + 1) * p.band) - item.band * p.band) * w.cols;
  a.outputs = int(p.outputs);
  a.blocks = w.blocks;
  a.seg = w.seg.data();
  a.off = w.off.data();
  a.val = w.val;
  return a;
}

// The pixels that the walks left side by side in `grids` go to rows of the image
static void weave(const PixelPlan& p, const Item& item, const float* grids, int64_t grid, int out0, int out1, void* dst, bool half) {
  const PixelKernels& kernels = pixel_kernels();
  const int64_t steps_w = p.walks[0].col_step, samples = p.samples(item.group);
  for (size_t first = 0; first < p.walks.size(); first += steps_w) {
    const int64_t rows = std::min(p.walks[first].rows - item.band * p.band, p.band);
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t c = out0; c < out1; ++c)
        for (int64_t r = 0; r < rows; ++r) {
          const PixelWalk& w = p.walks[first];
          const int64_t row = w.row0 + (item.band * p.band + r) * w.row_step;
          const int64_t at = (((item.group * p.group + s) * p.outputs + c) * p.out_h + row) * p.out_w;
          const auto source = [&](int64_t b) {
            return grids + (first + b) * grid + (s * p.outputs + c) * p.band * p.walks[first + b].cols + r * p.walks[first + b].cols;
          };
          int64_t b0 = 0, pairs = 0;
          if (steps_w == 2) {
            b0 = w.col0 == 0 ? 0 : 1;
            pairs = p.out_w / 2;
            kernels.interleave(source(b0), source(1 - b0), bytes_at(dst, half, at), half, pairs);
            if (p.out_w % 2) kernels.spread(source(b0) + pairs, bytes_at(dst, half, at + p.out_w - 1), half, 2, 1);
          } else {
            for (int64_t b = 0; b < steps_w; ++b)
              kernels.spread(source(b), bytes_at(dst, half, at + p.walks[first + b].col0), half, steps_w, p.walks[first + b].cols);
          }
        }
  }
}

static void run(const PixelPlan& p, const void* src, void* dst, bool half, const float* bias, int64_t threads) {
  const PixelKernels& kernels = pixel_kernels();
  const bool woven = p.walks.size() > 1;
  int64_t grid = 0;
  for (const PixelWalk& w : p.walks) grid = std::max(grid, p.group * p.outputs * p.band * w.cols);
  parallel_ranges(p.items(), threads, [&](int64_t, int64_t begin, int64_t end) {
    float* const buffer = kept<Use::planes>(plane_floats(p));
    float* const sums = kept<Use::parts>(p.outputs * kernels.registers * kernels.lanes);
    float* const grids = woven ? kept<Use::outputs>(grid * int64_t(p.walks.size())) : nullptr;
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const Item item(p, i);
      const float* planes = planes_of(p, item, packed, src, half, buffer);
      // phases have different entries, so a part is a range of outputs alike for all of them
      const auto [out0, out1] = woven ? std::pair{int(p.outputs * item.part / p.parts), int(p.outputs * (item.part + 1) / p.parts)}
                                      : part_outputs(p.walks[0], p.outputs, item.part, p.parts);
      for (size_t k = 0; k < p.walks.size(); ++k) {
        const PixelWalk& w = p.walks[k];
        PixelArgs a = walk_args(p, w, item, planes);
        a.part = sums;
        a.bias = bias;
        a.out0 = out0;
        a.out1 = out1;
        if (!a.pixels) continue;
        if (woven) {
          a.y = grids + k * grid;
          a.y_plane = p.band * w.cols;
          a.y_sample = p.outputs * a.y_plane;
        } else {
          a.half = half;
          a.y_plane = p.out_h * p.out_w;
          a.y_sample = p.outputs * a.y_plane;
          a.y = bytes_at(dst, half, item.group * p.group * a.y_sample + item.band * p.band * p.out_w);
        }
        kernels.rows(a);
      }
      if (woven) weave(p, item, grids, grid, out0, out1, dst, half);
    }
  });
}

static void check_range(const PixelPlan& p) {
  STD_TORCH_CHECK(p.sample_floats < (int64_t(1) << 31),
                  "masked_conv2d: the images are too large for the pixel kernel; use dense weights for this layer");
}

Tensor pixel_conv2d(const Tensor& x_in, const ConvShape& s, const Rows& rows, const float* values, const float* bias) {
  static thread_local PixelPlan plan;
  const Tensor x = torch::stable::contiguous(x_in);
  const int64_t threads = num_threads();
  forward_plan(plan, s, rows, values, is_half(x), threads);
  check_range(plan);
  Tensor y = new_image(x, s.n, s.o, s.oh(), s.ow(), false);
  run(plan, x.const_data_ptr(), y.mutable_data_ptr(), is_half(x), bias, threads);
  return channels_last(x_in) ? as_channels_last(y) : y;
}

Tensor pixel_conv2d_input_grad(const Tensor& grad_in, const ConvShape& s, const Rows& transposed, const int32_t* perm,
                               const float* values, bool channels_last) {
  static thread_local PixelPlan plan;
  const Tensor grad = torch::stable::contiguous(grad_in);
  const int64_t threads = num_threads();
  input_grad_plan(plan, s, transposed, perm, values, is_half(grad), threads);
  check_range(plan);
  Tensor dx = new_image(grad, s.n, s.c, s.h, s.w, false);
  run(plan, grad.const_data_ptr(), dx.mutable_data_ptr(), is_half(grad), nullptr, threads);
  return channels_last ? as_channels_last(dx) : dx;
}

void pixel_conv2d_weight_grad(const Tensor& grad_in, const Tensor& x_in, const ConvShape& s, const Rows& rows, float* out) {
  static thread_local PixelPlan plan;
  const PixelPlan& p = plan;  // a lambda on another thread would otherwise see that thread's own
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  const int64_t threads = num_threads(), nnz = rows.ptr[s.o];
  forward_plan(plan, s, rows, nullptr, is_half(x), threads);
  check_range(p);
  const PixelKernels& kernels = pixel_kernels();
  const PixelWalk& w = p.walks[0];
  const void *src = x.const_data_ptr(), *g = grad.const_data_ptr();
  const bool half = is_half(x), grad_half = is_half(grad);
  int64_t longest = 0;
  for (int64_t o = 0; o < s.o; ++o) longest = std::max<int64_t>(longest, w.begin[o + 1] - w.begin[o]);
  const int64_t entries = nnz * kernels.lanes <= kHeldFloats ? nnz : std::max(longest, kHeldFloats / 4 / kernels.lanes);
  const bool held = entries == nnz;
  float* const partial = kept<Use::shared>(threads * nnz);
  std::memset(partial, 0, threads * nnz * sizeof(float));
  parallel_ranges(p.items(), threads, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const buffer = kept<Use::planes>(plane_floats(p));
    float* const acc = kept<Use::sums>(entries * kernels.lanes);
    float* const total = partial + thread * nnz;
    if (held) std::memset(acc, 0, entries * kernels.lanes * sizeof(float));
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const Item item(p, i);
      PixelArgs a = walk_args(p, w, item, planes_of(p, item, packed, src, half, buffer));
      a.half = grad_half;
      a.y_plane = p.out_h * p.out_w;
      a.y_sample = p.outputs * a.y_plane;
      a.y = const_cast<void*>(bytes_at(g, grad_half, item.group * p.group * a.y_sample + item.band * p.band * p.out_w));
      a.acc = acc;
      const auto [out0, out1] = part_outputs(w, p.outputs, item.part, p.parts);
      if (held) {
        a.out0 = out0;
        a.out1 = out1;
        kernels.weight_grad(a);
        continue;
      }
      for (int o = out0; o < out1;) {
        int next = o + 1;
        while (next < out1 && w.begin[next + 1] - w.begin[o] <= entries) ++next;
        const int64_t count = w.begin[next] - w.begin[o];
        std::memset(acc, 0, count * kernels.lanes * sizeof(float));
        a.out0 = o;
        a.out1 = next;
        a.acc0 = w.begin[o];
        kernels.weight_grad(a);
        kernels.reduce(acc, total + w.begin[o], count);
        o = next;
      }
    }
    if (held) kernels.reduce(acc, total, nnz);
  });
  sum_parts(partial, threads, nnz, out);
}

}  // namespace pst
