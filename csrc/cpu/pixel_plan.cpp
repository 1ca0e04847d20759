#include "cpu/pixel_plan.h"

#include <numeric>

#include "cpu/floor_div.h"

namespace pst {

// what a register block reads before the next one evicts it: 36 KB of a 48 KB L1
constexpr int64_t kBlockLines = 36 * 1024 / 64;
// and then serves this many entries an output at least: fewer do not pay for moving its sums
constexpr int64_t kBlockEntries = 4;
// planes of a group of samples: 512 KB of a 2 MB L2
constexpr int64_t kPlaneFloats = 512 * 1024 / 4;
// a band of fewer pixels leaves most sums of a register block unused
constexpr int64_t kBandPixels = 128;

namespace {
// tap t of an axis reads index i * stride + shift[t] for output i of phase[t], which has size[phase] outputs
struct Axis {
  int64_t stride;
  std::vector<int64_t> shift, phase, size, first;
};
}  // namespace

static Axis forward_axis(int64_t out, int64_t k, int64_t stride, int64_t pad, int64_t dil) {
  Axis a{stride, {}, std::vector<int64_t>(k, 0), {out}, {0}};
  for (int64_t t = 0; t < k; ++t) a.shift.push_back(t * dil - pad);
  return a;
}

static Axis grad_axis(int64_t size, int64_t k, int64_t stride, int64_t pad, int64_t dil) {
  Axis a{1, {}, {}, {}, {}};
  std::vector<int64_t> low;
  for (int64_t f = 0; f < stride; ++f) {
    const int64_t u0 = std::max<int64_t>(0, ceil_div(pad - f, stride)), u1 = floor_div(size - 1 + pad - f, stride) + 1;
    low.push_back(u0);
    a.size.push_back(std::max<int64_t>(0, u1 - u0));
    a.first.push_back(f - pad + stride * u0);
  }
  for (int64_t t = 0; t < k; ++t) {
    a.phase.push_back(t * dil % stride);
    a.shift.push_back(low[a.phase.back()] - t * dil / stride);
  }
  return a;
}

static void choose_groups(PixelPlan& p, int64_t grid_rows, int64_t grid_cols, int64_t halo_rows, int64_t threads) {
  const PixelKernels& k = pixel_kernels();
  const int64_t pixels = std::max<int64_t>(1, grid_rows * grid_cols), vectors = ceil_div(pixels, k.lanes);
  p.group = std::clamp<int64_t>(ceil_div(k.registers, vectors), 1, std::max<int64_t>(1, p.n / threads));
  p.groups = ceil_div(p.n, p.group);
  const int64_t sample = p.channels * int64_t(p.columns.size()) * (grid_rows + halo_rows) * grid_cols;
  int64_t bands = std::clamp<int64_t>(ceil_div(sample * p.group, kPlaneFloats), 1, std::max<int64_t>(1, grid_rows));
  if (p.groups < threads) bands = std::max(bands, std::min(threads, pixels / kBandPixels));
  p.band = std::max<int64_t>(1, ceil_div(grid_rows, bands));
  // whole vectors a band, where that takes few rows more
  const int64_t even = k.lanes / std::gcd<int64_t>(k.lanes, std::max<int64_t>(1, grid_cols)), rounded = ceil_div(p.band, even) * even;
  if (bands > 1 && rounded * 4 <= p.band * 5) p.band = rounded;
  p.bands = std::max<int64_t>(1, ceil_div(grid_rows, p.band));
  const int64_t work = p.groups * p.bands;
  p.parts = work % threads == 0 || work >= 4 * threads ? 1 : std::min(threads, p.outputs);
  p.parts = std::max<int64_t>(1, p.parts);
}

static void lay_out(PixelPlan& p, const Axis& rows, const Axis& cols, bool half, int64_t threads) {
  const int64_t kh = int64_t(rows.shift.size()), kw = int64_t(cols.shift.size()), lanes = pixel_kernels().lanes;
  p.row_stride = rows.stride;
  p.col_stride = cols.stride;
  p.columns.clear();
  for (int64_t t = 0; t < kw; ++t) {
    const int64_t width = cols.size[cols.phase[t]];
    p.columns.push_back({width, cols.shift[t], 0, 0, rows.stride == 1 && cols.stride == 1 && width == p.w});
  }
  p.classes.assign(rows.stride, {INT64_MAX, 0, 0});
  std::vector<int64_t> high(rows.stride, INT64_MIN);
  for (int64_t shift : rows.shift) {
    const int64_t m = floor_div(shift, rows.stride), f = shift - m * rows.stride;
    p.classes[f].lo = std::min(p.classes[f].lo, m);
    high[f] = std::max(high[f], m);
  }
  const int64_t grid_rows = *std::max_element(rows.size.begin(), rows.size.end());
  const int64_t grid_cols = *std::max_element(cols.size.begin(), cols.size.end());
  int64_t halo = 0;
  for (int64_t f = 0; f < rows.stride; ++f)
    if (high[f] != INT64_MIN) halo += high[f] - p.classes[f].lo;
  choose_groups(p, grid_rows, grid_cols, halo, threads);

  int64_t plane_rows = 0, most_rows = 0;
  for (int64_t f = 0; f < rows.stride; ++f) {
    PixelPlan::RowClass& c = p.classes[f];
    if (high[f] == INT64_MIN) {
      c = {0, 0, plane_rows};
      continue;
    }
    c.rows = high[f] - c.lo + p.band;
    c.base = plane_rows;
    plane_rows += c.rows;
    most_rows = std::max(most_rows, c.rows);
  }
  p.tap_row.clear();
  for (int64_t shift : rows.shift) {
    const int64_t m = floor_div(shift, rows.stride), f = shift - m * rows.stride;
    p.tap_row.push_back(p.classes[f].base + m - p.classes[f].lo);
  }

  bool whole = true;  // no vector reads past the rows of its plane
  for (const auto& c : p.columns) whole = whole && p.band * c.width % lanes == 0 && grid_rows % p.band == 0;
  p.direct = kh * kw == 1 && p.row_stride == 1 && p.col_stride == 1 && rows.shift[0] == 0 && cols.shift[0] == 0 && !half &&
             whole && grid_rows == p.h && grid_cols == p.w;
  int64_t at = 0, mask_at = 0;
  for (auto& c : p.columns) {
    c.plane = at;
    at += (plane_rows * c.width + 15) / 16 * 16 + (whole ? 0 : 16);
    c.mask = mask_at;
    mask_at += (c.flat ? most_rows * c.width : c.width) + lanes;
  }
  // planes a multiple of 512 bytes apart would share few sets of L1
  p.channel_floats = p.direct ? p.h * p.w : at % 128 ? at : at + 16;
  p.sample_floats = p.channels * p.channel_floats;
  p.masks.assign(mask_at, 0);
  for (const auto& c : p.columns) {
    const int64_t count = c.flat ? most_rows * c.width : c.width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = c.start + p.col_stride * (i % c.width);
      p.masks[c.mask + i] = from >= 0 && from < p.w ? ~0u : 0u;
    }
  }
  p.used.assign(p.channels * kw, 0);

  const int64_t phases_h = int64_t(rows.size.size()), phases_w = int64_t(cols.size.size());
  p.walks.resize(phases_h * phases_w);
  for (int64_t a = 0; a < phases_h; ++a)
    for (int64_t b = 0; b < phases_w; ++b) {
      PixelWalk& walk = p.walks[a * phases_w + b];
      walk.rows = rows.size[a];
      walk.cols = cols.size[b];
      walk.row0 = rows.first[a];
      walk.col0 = cols.first[b];
      walk.row_step = phases_h;
      walk.col_step = phases_w;
    }
}

static std::vector<int32_t> tap_offsets(const PixelPlan& p) {
  std::vector<int32_t> table;
  table.reserve(p.channels * p.tap_row.size() * p.columns.size());
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t row : p.tap_row)
      for (const auto& column : p.columns)
        table.push_back(int32_t(c * p.channel_floats + (p.direct ? 0 : column.plane + row * column.width)));
  return table;
}

// Splits every row at multiples of a channel count whose planes a register block keeps in L1
static void block_channels(const PixelPlan& p, PixelWalk& w) {
  const PixelKernels& k = pixel_kernels();
  const int64_t pixels = std::min(p.band, std::max<int64_t>(1, w.rows)) * w.cols, r = samples_at_once(k, pixels, p.group);
  const int64_t block = std::min(pixels, k.registers / r * k.lanes);
  int64_t lines = 0;
  for (const auto& column : p.columns)
    for (const auto& c : p.classes)
      if (c.rows) lines += r * (ceil_div(block + (c.rows - p.band) * column.width, 16) + 1);
  const int64_t per_block = std::max<int64_t>(1, kBlockLines / std::max<int64_t>(1, lines));
  const int64_t most = (w.begin[p.outputs] - w.begin[0]) / std::max<int64_t>(1, p.outputs * kBlockEntries);
  w.blocks = int(std::clamp<int64_t>(ceil_div(p.channels, per_block), 1, std::max<int64_t>(1, most)));
  w.seg.resize((w.blocks + 1) * p.outputs);
  const int64_t size = ceil_div(p.channels, w.blocks);
  for (int64_t o = 0; o < p.outputs; ++o) {
    int32_t e = w.begin[o];
    const int32_t end = w.begin[o + 1];
    for (int b = 0; b < w.blocks; ++b) {
      w.seg[b * p.outputs + o] = e;
      const int64_t limit = (b + 1) * size * p.channel_floats;
      if (b + 1 < w.blocks)
        while (e < end && w.off[e] < limit) ++e;
    }
    w.seg[w.blocks * p.outputs + o] = end;
  }
}

static void mark_used(PixelPlan& p, const int32_t* col, int64_t nnz) {
  const int64_t kw = int64_t(p.columns.size()), taps = kw * int64_t(p.tap_row.size());
  std::vector<int32_t> plane;
  plane.reserve(p.channels * taps);
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t t = 0; t < taps; t += kw)
      for (int64_t i = 0; i < kw; ++i) plane.push_back(int32_t(c * kw + i));
  for (int64_t k = 0; k < nnz; ++k) p.used[plane[col[k]]] = 1;
}

void forward_plan(PixelPlan& p, const ConvShape& s, const Rows& rows, const float* values, bool half, int64_t threads) {
  p.n = s.n;
  p.channels = s.c;
  p.h = s.h;
  p.w = s.w;
  p.outputs = s.o;
  p.out_h = s.oh();
  p.out_w = s.ow();
  lay_out(p, forward_axis(p.out_h, s.kh, s.sh, s.ph, s.dh), forward_axis(p.out_w, s.kw, s.sw, s.pw, s.dw), half, threads);
  const std::vector<int32_t> table = tap_offsets(p);
  const int64_t nnz = rows.ptr[s.o];
  PixelWalk& w = p.walks[0];
  w.begin.assign(rows.ptr, rows.ptr + s.o + 1);
  w.off.resize(nnz);
  for (int64_t k = 0; k < nnz; ++k) w.off[k] = table[rows.col[k]];
  w.val = values;
  mark_used(p, rows.col, nnz);
  block_channels(p, w);
}

void input_grad_plan(PixelPlan& p, const ConvShape& s, const Rows& rows, const int32_t* perm, const float* values, bool half,
                     int64_t threads) {
  p.n = s.n;
  p.channels = s.o;
  p.h = s.oh();
  p.w = s.ow();
  p.outputs = s.c;
  p.out_h = s.h;
  p.out_w = s.w;
  const Axis row = grad_axis(s.h, s.kh, s.sh, s.ph, s.dh), column = grad_axis(s.w, s.kw, s.sw, s.pw, s.dw);
  lay_out(p, row, column, half, threads);
  const std::vector<int32_t> table = tap_offsets(p);
  const int64_t taps = s.kh * s.kw, nnz = rows.ptr[s.c], phases = int64_t(p.walks.size());
  std::vector<int32_t> tap_walk;
  tap_walk.reserve(s.o * taps);
  for (int64_t o = 0; o < s.o; ++o)
    for (int64_t a : row.phase)
      for (int64_t b : column.phase) tap_walk.push_back(int32_t(a * s.sw + b));
  for (PixelWalk& w : p.walks) {
    w.off.clear();
    w.own_val.clear();
    w.begin.assign(1, 0);
    w.off.reserve(nnz);
    w.own_val.reserve(nnz);
  }
  for (int64_t c = 0; c < s.c; ++c) {
    for (int32_t k = rows.ptr[c]; k < rows.ptr[c + 1]; ++k) {
      PixelWalk& w = p.walks[phases == 1 ? 0 : tap_walk[rows.col[k]]];
      w.off.push_back(table[rows.col[k]]);
      w.own_val.push_back(values[perm[k]]);
    }
    for (PixelWalk& w : p.walks) w.begin.push_back(int32_t(w.off.size()));
  }
  mark_used(p, rows.col, nnz);
  for (PixelWalk& w : p.walks) {
    w.val = w.own_val.data();
    block_channels(p, w);
  }
}

void PixelPlan::pack(const void* src, bool half, int64_t g, int64_t b, bool clean, float* dst) const {
  const int64_t plane_bytes = h * w * (half ? 2 : 4);
  const char *lo = static_cast<const char*>(src), *hi = lo + n * channels * plane_bytes;
  std::vector<PackColumn> to;
  for (size_t t = 0; t < columns.size(); ++t) {
    const Column& c = columns[t];
    const int64_t end = t + 1 < columns.size() ? columns[t + 1].plane : channel_floats;
    to.push_back({c.width, c.start, c.plane, end, masks.data() + c.mask, c.flat});
  }
  std::vector<PackRows> rows;
  for (int64_t f = 0; f < row_stride; ++f) {
    const RowClass& k = classes[f];
    // plane rows [r0, r1) lie inside the image
    const int64_t first = k.lo + b * band;
    const int64_t r0 = std::clamp<int64_t>(-first, 0, k.rows), r1 = std::clamp<int64_t>(ceil_div(h - f, row_stride) - first, r0, k.rows);
    rows.push_back({r0, r1 - r0, k.rows - r1, (first + r0) * row_stride + f});
  }
  PackArgs a{};
  a.lo = lo;
  a.hi = hi;
  a.half = half;
  a.channels = channels;
  a.src_channel = h * w;
  a.src_row = w;
  a.row_stride = row_stride;
  a.col_stride = col_stride;
  a.columns = to.data();
  a.column_count = int64_t(to.size());
  a.rows = rows.data();
  a.row_count = int64_t(rows.size());
  a.used = used.data();
  a.channel_floats = channel_floats;
  a.clean = clean;
  for (int64_t s = 0; s < samples(g); ++s) {
    a.src = lo + (g * group + s) * channels * plane_bytes;
    a.dst = dst + s * sample_floats;
    pixel_kernels().pack(a);
  }
}

std::pair<int, int> part_outputs(const PixelWalk& w, int64_t outputs, int64_t p, int64_t parts) {
  // a store costs about as much as two entries
  const auto bound = [&](int64_t i) {
    const int64_t goal = (w.begin[outputs] + 2 * outputs) * i / parts;
    int64_t lo = 0, hi = outputs;
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (w.begin[mid] + 2 * mid < goal)
        lo = mid + 1;
      else
        hi = mid;
    }
    return int(lo);
  };
  return {bound(p), p + 1 == parts ? int(outputs) : bound(p + 1)};
}

}  // namespace pst
