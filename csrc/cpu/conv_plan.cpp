#include "cpu/conv_plan.h"

#include "cpu/floor_div.h"
#include "cpu/half.h"

namespace pst {

// lines of 64 bytes that a register block may read before the next block evicts them: 36 KB of a 48 KB L1
constexpr int64_t kL1Lines = 36 * 1024 / 64;

Plane input_plane(const ConvShape& s) {
  const int64_t need_h = (s.oh() - 1) * s.sh + (s.kh - 1) * s.dh + 1, need_w = (s.ow() - 1) * s.sw + (s.kw - 1) * s.dw + 1;
  return {s.h, s.w, s.ph, s.pw, std::max<int64_t>(0, need_h - s.h - s.ph), std::max<int64_t>(0, need_w - s.w - s.pw)};
}

// A phase of the input gradient along one axis: padded input rows q = a + stride * u, u in [u0, u1), read output rows u - shift
struct Phase {
  int64_t u0, u1;
};

static Phase phase(int64_t a, int64_t size, int64_t stride, int64_t pad) {
  return {std::max<int64_t>(0, ceil_div(pad - a, stride)), floor_div(size - 1 + pad - a, stride) + 1};
}

static void grad_halo(int64_t size, int64_t out, int64_t k, int64_t stride, int64_t pad, int64_t dil, int64_t& low, int64_t& high) {
  low = high = 0;
  for (int64_t a = 0; a < stride; ++a) {
    const Phase p = phase(a, size, stride, pad);
    if (p.u0 >= p.u1) continue;
    for (int64_t r = 0; r < k; ++r) {
      if ((r * dil - a) % stride) continue;
      const int64_t shift = (r * dil - a) / stride;
      low = std::max(low, shift - p.u0);
      high = std::max(high, p.u1 - 1 - shift - (out - 1));
    }
  }
}

Plane grad_plane(const ConvShape& s) {
  Plane p{s.oh(), s.ow(), 0, 0, 0, 0};
  grad_halo(s.h, s.oh(), s.kh, s.sh, s.ph, s.dh, p.top, p.bottom);
  grad_halo(s.w, s.ow(), s.kw, s.sw, s.pw, s.dw, p.left, p.right);
  return p;
}

// Splits every row at multiples of a channel count whose planes a register block keeps in L1
static void block_channels(Walk& w, int64_t outputs, int64_t channels, int64_t lines) {
  const std::vector<int32_t>& channel = w.channel;
  const int64_t per_block = std::max<int64_t>(1, kL1Lines / std::max<int64_t>(1, lines));
  w.blocks = int(std::max<int64_t>(1, ceil_div(channels, per_block)));
  const int64_t size = ceil_div(channels, w.blocks);
  w.seg.assign((w.blocks + 1) * outputs, 0);
  for (int64_t o = 0; o < outputs; ++o) {
    int32_t k = w.row_begin[o];
    const int32_t end = w.row_begin[o + 1];
    for (int b = 0; b < w.blocks; ++b) {
      w.seg[b * outputs + o] = k;
      while (k < end && channel[k] < (b + 1) * size) ++k;
    }
    w.seg[w.blocks * outputs + o] = end;
  }
}

Walk forward_walk(const ConvShape& s, const Rows& rows, const Plane& x, const Plane& y) {
  Walk w;
  const int64_t taps = s.kh * s.kw, nnz = rows.ptr[s.o];
  w.off.resize(nnz);
  w.source.resize(nnz);
  w.row_begin.assign(rows.ptr, rows.ptr + s.o + 1);
  w.channel.resize(nnz);
  std::vector<int32_t> tap_off(taps);
  for (int64_t t = 0; t < taps; ++t)
    tap_off[t] = int32_t(((t / s.kw) * s.dh * x.wp() + (t % s.kw) * s.dw) * kLanes);
  for (int64_t k = 0; k < nnz; ++k) {
    const int64_t c = rows.col[k] / taps;
    w.source[k] = int32_t(k);
    w.channel[k] = int32_t(c);
    w.off[k] = int32_t(c * x.floats() + tap_off[rows.col[k] - c * taps]);
  }
  w.x_origin = ((x.top - s.ph) * x.wp() + (x.left - s.pw)) * kLanes;
  w.y_origin = y.origin();
  w.x_row = s.sh * x.row();
  w.x_pix = s.sw * kLanes;
  w.y_row = y.row();
  w.y_pix = kLanes;
  w.rows = s.oh();
  w.cols = s.ow();
  const int64_t r = std::min<int64_t>(w.rows, 2), q = std::min<int64_t>(w.cols, 8);
  block_channels(w, s.o, s.c, ((r - 1) * s.sh + (s.kh - 1) * s.dh + 1) * ((q - 1) * s.sw + (s.kw - 1) * s.dw + 1));
  return w;
}

std::vector<Walk> input_grad_walks(const ConvShape& s, const Rows& rows, const int32_t* perm, const Plane& x,
                                   const Plane& y) {
  const int64_t taps = s.kh * s.kw, nnz = rows.ptr[s.c];
  std::vector<Walk> walks(s.sh * s.sw);
  std::vector<int32_t> tap_walk(taps), tap_off(taps);
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t r = (t / s.kw) * s.dh, c = (t % s.kw) * s.dw;
    tap_walk[t] = int32_t((r % s.sh) * s.sw + c % s.sw);
    tap_off[t] = int32_t(-((r / s.sh) * y.wp() + c / s.sw) * kLanes);
  }
  for (Walk& w : walks) {
    w.row_begin.assign(1, 0);
    w.off.reserve(nnz / walks.size() + s.c);
  }
  for (int64_t c = 0; c < s.c; ++c) {
    for (int32_t k = rows.ptr[c]; k < rows.ptr[c + 1]; ++k) {
      const int64_t o = rows.col[k] / taps, t = rows.col[k] - o * taps;
      Walk& w = walks[tap_walk[t]];
      w.channel.push_back(int32_t(o));
      w.off.push_back(int32_t(o * y.floats() + tap_off[t]));
      w.source.push_back(perm[k]);
    }
    for (Walk& w : walks) w.row_begin.push_back(int32_t(w.off.size()));
  }
  for (int64_t a = 0; a < s.sh; ++a)
    for (int64_t b = 0; b < s.sw; ++b) {
      Walk& w = walks[a * s.sw + b];
      const Phase pr = phase(a, s.h, s.sh, s.ph), pc = phase(b, s.w, s.sw, s.pw);
      w.rows = std::max<int64_t>(0, pr.u1 - pr.u0);
      w.cols = std::max<int64_t>(0, pc.u1 - pc.u0);
      w.first = a - s.ph + s.sh * pr.u0;
      w.row_step = s.sh;
      w.x_origin = ((pr.u0 + y.top) * y.wp() + pc.u0 + y.left) * kLanes;
      w.y_origin = x.origin() + (w.first * x.wp() + b - s.pw + s.sw * pc.u0) * kLanes;
      w.x_row = y.row();
      w.x_pix = kLanes;
      w.y_row = s.sh * x.row();
      w.y_pix = s.sw * kLanes;
      const int64_t r = std::min<int64_t>(w.rows, 2), q = std::min<int64_t>(w.cols, 8);
      block_channels(w, s.c, s.o,
                     (r + ceil_div((s.kh - 1) * s.dh, s.sh)) * (q + ceil_div((s.kw - 1) * s.dw, s.sw)));
    }
  return walks;
}

RowsArgs rows_args(const Walk& w, const float* x, float* y, int64_t outputs, int64_t y_plane, const float* bias) {
  RowsArgs a{};
  a.x = x + w.x_origin;
  a.y = y + w.y_origin;
  a.x_row = w.x_row;
  a.x_pix = w.x_pix;
  a.y_row = w.y_row;
  a.y_pix = w.y_pix;
  a.y_plane = y_plane;
  a.row0 = 0;
  a.row1 = int(w.rows);
  a.cols = int(w.cols);
  a.out0 = 0;
  a.out1 = a.outputs = int(outputs);
  a.blocks = w.blocks;
  a.seg = w.seg.data();
  a.off = w.off.data();
  a.bias = bias;
  return a;
}

int64_t longest_row(const Walk& w, int64_t outputs) {
  int64_t most = 0;
  for (int64_t o = 0; o < outputs; ++o) most = std::max<int64_t>(most, w.row_begin[o + 1] - w.row_begin[o]);
  return most;
}

void weight_grad_rows(const Walk& w, RowsArgs a, int64_t out0, int64_t out1, int64_t entries, float* acc, float* grad) {
  for (int64_t o = out0; o < out1;) {
    int64_t next = o + 1;
    while (next < out1 && w.row_begin[next + 1] - w.row_begin[o] <= entries) ++next;
    const int64_t k0 = w.row_begin[o], count = w.row_begin[next] - k0;
    if (count) {
      std::memset(acc, 0, count * kLanes * sizeof(float));
      a.out0 = int(o);
      a.out1 = int(next);
      a.acc = acc;
      a.acc0 = k0;
      tile_kernels().weight_grad(a);
      tile_kernels().reduce(acc, grad + k0, count);
    }
    o = next;
  }
}

void sum_parts(const float* parts, int64_t count, int64_t size, float* out) {
  for (int64_t k = 0; k < size; ++k) {
    float sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += parts[t * size + k];
    out[k] = sum;
  }
}

void clear_halo(float* plane, const Plane& p) {
  const int64_t row = p.row(), gap = (p.left + p.right) * kLanes;
  if (p.top + p.bottom + gap == 0) return;
  const auto clear = [](float* at, int64_t floats) { std::memset(at, 0, floats * sizeof(float)); };
  // the right edge of a row meets the left edge of the next
  float* inside = plane + p.origin();
  clear(plane, p.origin());
  for (int64_t r = 0; gap && r + 1 < p.h; ++r) clear(inside + r * row + p.w * kLanes, gap);
  clear(inside + (p.h - 1) * row + p.w * kLanes, p.right * kLanes + p.bottom * row);
}

Image::Image(int64_t n, int64_t c, const Plane& plane, bool channels_last, bool half)
    : n_(n), c_(c), plane_(plane), last_(channels_last), half_(half), pixel_(plane.h * plane.w), channel_(channels_last ? c : 0) {
  for (int64_t i = 0; i < plane.h * plane.w; ++i)
    pixel_[i] = int32_t((i / plane.w * plane.wp() + i % plane.w) * kLanes);
  for (int64_t i = 0; i < int64_t(channel_.size()); ++i) channel_[i] = int32_t(i * plane.floats());
}

void Image::pack(const void* src, int64_t tile, float* dst, int64_t c0, int64_t c1) const {
  const TileKernels& kernels = tile_kernels();
  const int64_t hw = plane_.h * plane_.w, stride = c_ * hw, first = tile * kLanes * stride;
  const int lanes = int(std::min<int64_t>(kLanes, n_ - tile * kLanes));
  for (int64_t c = c0; c < c1; ++c) {
    clear_halo(dst + c * plane_.floats(), plane_);
    if (!last_)
      kernels.pack(bytes_at(src, half_, first + c * hw), half_, stride, lanes, dst + c * plane_.floats() + plane_.origin(),
                   pixel_.data(), hw);
  }
  if (last_)
    for (int64_t i = 0; i < hw; ++i)
      kernels.pack(bytes_at(src, half_, first + i * c_ + c0), half_, stride, lanes,
                   dst + c0 * plane_.floats() + plane_.origin() + pixel_[i], channel_.data(), c1 - c0);
}

void Image::unpack(const float* src, int64_t src_plane, int64_t src_row, void* dst, int64_t tile, int64_t r0, int64_t r1) const {
  const TileKernels& kernels = tile_kernels();
  const int64_t hw = plane_.h * plane_.w, stride = c_ * hw, pixels = (r1 - r0) * plane_.w, first = tile * kLanes * stride;
  const int lanes = int(std::min<int64_t>(kLanes, n_ - tile * kLanes));
  std::vector<int32_t> table(last_ ? c_ : pixels);
  for (int64_t i = 0; i < int64_t(table.size()); ++i)
    table[i] = int32_t(last_ ? i * src_plane : i / plane_.w * src_row + i % plane_.w * kLanes);
  if (last_) {
    for (int64_t i = 0; i < pixels; ++i)
      kernels.unpack(src + i / plane_.w * src_row + i % plane_.w * kLanes, table.data(),
                     bytes_at(dst, half_, first + (r0 * plane_.w + i) * c_), half_, stride, lanes, c_);
  } else {
    for (int64_t c = 0; c < c_; ++c)
      kernels.unpack(src + c * src_plane, table.data(), bytes_at(dst, half_, first + c * hw + r0 * plane_.w), half_, stride, lanes,
                     pixels);
  }
}

}  // namespace pst
