// GroupKernels of tiles.h for one instruction set (each_isa.inl): kGroup output channels together, so that a pixel loaded once
// serves each of them that has a weight there. Columns are sorted by which outputs those are, a loop each.

namespace groups {

#include "cpu/tile_block.inl"

constexpr int kPatterns = 1 << kGroup;
// register block: kGroup outputs x R x Q pixels
constexpr int kGroupRows = PST_REGS >= 16 && PST_W == 16 ? 2 : 1;
constexpr int kGroupCols = 3;

constexpr int bits(int pattern) { return pattern ? (pattern & 1) + bits(pattern >> 1) : 0; }

// columns [off, end), each with weights for the outputs in Pattern
template <int Pattern, int R, int Q>
static inline __attribute__((always_inline)) void add_columns(V (&acc)[kGroup][R * Q], const float* in, const int32_t* off,
                                                              const int32_t* end, const float*& val, int64_t x_row,
                                                              int64_t x_pix) {
  const float* v = val;
  for (; off != end; ++off) {
    const float* p = in_register(in + *off);
    V px[R * Q];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) px[r * Q + q] = load(p + q * x_pix);
      if (r + 1 < R) p += x_row;
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) {
      if (!(Pattern >> g & 1)) continue;
      const V w = splat(*v++);
#pragma GCC unroll 32
      for (int i = 0; i < R * Q; ++i) acc[g][i] += w * px[i];
    }
  }
  val = v;
}

template <int R, int Q, int... P>
static inline __attribute__((always_inline)) void add_patterns(V (&acc)[kGroup][R * Q], const float* in, const RowsArgs& a,
                                                               const int32_t* seg, const float* val,
                                                               std::integer_sequence<int, P...>) {
  const int32_t* const off = a.group_off;
  (add_columns<P + 1, R, Q>(acc, in, off + seg[P], off + seg[P + 1], val, a.x_row, a.x_pix), ...);
}

template <int R, int Q>
static void group_block(const RowsArgs& a, int row, int col) {
  const int64_t y_pix = a.y_pix, y_row = a.y_row;
  const float* x = a.x + row * a.x_row + col * a.x_pix;
  float* y = a.y + row * y_row + col * y_pix;
  const bool first = a.fresh && row == 0 && col == 0;
  for (int b = 0; b < a.group_blocks; ++b) {
    const bool last = b + 1 == a.group_blocks;
    for (int o0 = a.out0; o0 < a.out1; o0 += kGroup) {
      const int64_t at = int64_t(b) * a.groups + o0 / kGroup;
      const int32_t* seg = a.group_seg + at * kPatterns;
      if (b && seg[0] == seg[kPatterns - 1] && !(last && (a.moments || a.gate_y))) continue;
      const int live = a.out1 - o0 < kGroup ? a.out1 - o0 : kGroup;
      for (int sub = 0; sub < kSub; ++sub) {
        V acc[kGroup][R * Q];
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g) {
          const int o = g < live ? o0 + g : o0;
          const float* out = y + o * a.y_plane + sub * PST_W;
          const float* from = b ? out : a.start ? a.start + (out - a.y) : nullptr;
          const V start = splat(a.bias ? a.bias[o] : 0.f);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) acc[g][r * Q + q] = from ? load(from + r * y_row + q * y_pix) : start;
        }
        add_patterns<R, Q>(acc, x + sub * PST_W, a, seg, a.group_val + a.group_first[at],
                           std::make_integer_sequence<int, kPatterns - 1>());
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g)
          if (g < live) {
            const int o = o0 + g;
            finish<R, Q>(a, o, sub, first, last, y + o * a.y_plane + sub * PST_W, acc[g]);
          }
      }
    }
  }
}

typedef void (*GroupBlock)(const RowsArgs&, int, int);
#if PST_W == 16
static const GroupBlock kGroupBlocks[2][kGroupCols] = {{group_block<1, 1>, group_block<1, 2>, group_block<1, 3>},
                                                       {group_block<2, 1>, group_block<2, 2>, group_block<2, 3>}};
#else
static const GroupBlock kGroupBlocks[1][kGroupCols] = {{group_block<1, 1>, group_block<1, 2>, group_block<1, 3>}};
#endif

static void group_rows(const RowsArgs& a) {
  const int pieces = (a.cols + kGroupCols - 1) / kGroupCols;
  for (int row = a.row0; row < a.row1;) {
    const int r = a.row1 - row < kGroupRows ? a.row1 - row : kGroupRows;
    for (int piece = 0, col = 0; piece < pieces; ++piece) {
      const int q = (a.cols - col + pieces - piece - 1) / (pieces - piece);
      kGroupBlocks[r - 1][q - 1](a, row, col);
      col += q;
    }
    row += r;
  }
}

// C columns x B outputs in registers over rows [row0, row1) of pixels; -> acc[column][output], added to it if `add`
template <int B, int C>
static void grad_columns(const RowsArgs& a, const int32_t* plane, const int32_t* off, int row0, int row1, bool add,
                         float* acc) {
  for (int sub = 0; sub < kSub; ++sub) {
    int64_t at[C], out[B];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) at[c] = off[c];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) out[b] = plane[b] * a.y_plane;
    V sum[B][C] = {};
    for (int row = row0; row < row1; ++row) {
      const float* x = a.x + row * a.x_row + sub * PST_W;
      const float* g = a.y + row * a.y_row + sub * PST_W;
      for (int col = 0; col < a.cols; ++col, x += a.x_pix, g += a.y_pix) {
        V gv[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) gv[b] = load(g + out[b]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          const V xv = load(x + at[c]);
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b) sum[b][c] += gv[b] * xv;
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        float* to = acc + (c * B + b) * kLanes + sub * PST_W;
        store(to, add ? load(to) + sum[b][c] : sum[b][c]);
      }
  }
}

typedef void (*GradColumns)(const RowsArgs&, const int32_t*, const int32_t*, int, int, bool, float*);
// columns that the registers hold beside the outputs, and a kernel for each count up to it
struct GradTile {
  int columns;
  GradColumns run[8];
};
#define PST_GRAD_2(B) grad_columns<B, 1>, grad_columns<B, 2>
#define PST_GRAD_4(B) PST_GRAD_2(B), grad_columns<B, 3>, grad_columns<B, 4>
#define PST_GRAD_6(B) PST_GRAD_4(B), grad_columns<B, 5>, grad_columns<B, 6>
#define PST_GRAD_8(B) PST_GRAD_6(B), grad_columns<B, 7>, grad_columns<B, 8>
#if PST_W == 16
static const GradTile kGradTiles[kGroup] = {
    {8, {PST_GRAD_8(1)}}, {8, {PST_GRAD_8(2)}}, {6, {PST_GRAD_6(3)}}, {6, {PST_GRAD_6(4)}}};
#else
static const GradTile kGradTiles[kGroup] = {
    {8, {PST_GRAD_8(1)}}, {4, {PST_GRAD_4(2)}}, {2, {PST_GRAD_2(3)}}, {2, {PST_GRAD_2(4)}}};
#endif
#undef PST_GRAD_2
#undef PST_GRAD_4
#undef PST_GRAD_6
#undef PST_GRAD_8

constexpr int kGradPixels = 64;  // of a channel at once: (4 + 2) x 64 lines of a 48 KB L1

static void group_grad(const RowsArgs& a, int64_t count, float* sums) {
  const int step = a.cols < kGradPixels ? kGradPixels / a.cols : 1;
  const bool once = a.row1 - a.row0 <= step;
  float* const kept = a.acc;
  float part[4 * 8 * kLanes];
  for (int row = a.row0; row < a.row1; row += step) {
    const int end = row + step < a.row1 ? row + step : a.row1;
    int64_t k = 0;
    for (int o0 = a.out0; o0 < a.out1; o0 += kGroup)
      for (int b = 0; b < a.group_blocks; ++b) {
        const int32_t* seg = a.group_seg + (int64_t(b) * a.groups + o0 / kGroup) * kPatterns;
        for (int p = 1; p < kPatterns; ++p) {
          int32_t plane[kGroup];
          int n = 0;
          for (int g = 0; g < kGroup; ++g)
            if (p >> g & 1) plane[n++] = o0 + g;
          const GradTile& tile = kGradTiles[n - 1];
          for (int32_t c = seg[p - 1]; c < seg[p]; c += tile.columns) {
            const int columns = seg[p] - c < tile.columns ? seg[p] - c : tile.columns;
            float* acc = once ? part : kept + k * kLanes;
            tile.run[columns - 1](a, plane, a.group_off + c, row, end, row != a.row0, acc);
            if (once) tile_kernels().reduce(part, sums + k, columns * n);
            k += columns * n;
          }
        }
      }
  }
  if (!once) tile_kernels().reduce(kept, sums, count);
}

static const GroupKernels kKernels = {kGroupRows, kGroupCols, group_rows, group_grad};

}  // namespace groups
