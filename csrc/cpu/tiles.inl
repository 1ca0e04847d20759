// TileKernels of tiles.h for one instruction set (each_isa.inl).

#include "cpu/tile_block.inl"

// R x Q output pixels in registers; S: floats from one pixel to the next on x, 0 when known at run time only
template <int R, int Q, int S>
static void rows_block(const RowsArgs& a, int row, int col) {
  const int64_t x_pix = S ? S : a.x_pix, x_row = a.x_row, y_pix = a.y_pix, y_row = a.y_row;
  const int32_t* const off = a.off;
  const float* const val = a.val;
  const float* x = a.x + row * x_row + col * x_pix;
  float* y = a.y + row * y_row + col * y_pix;
  for (int b = 0; b < a.blocks; ++b) {
    const int32_t* begin = a.seg + int64_t(b) * a.outputs;
    const int32_t* end = begin + a.outputs;
    for (int o = a.out0; o < a.out1; ++o) {
      const int32_t k0 = begin[o], k1 = end[o];
      const bool last = b + 1 == a.blocks;
      if (b && k0 == k1 && !(last && (a.moments || a.gate_y))) continue;
      for (int sub = 0; sub < kSub; ++sub) {
        float* out = y + o * a.y_plane + sub * PST_W;
        const float* in = x + sub * PST_W;
        V acc[R * Q];
        const float* begin_at = b ? out : a.start ? a.start + (out - a.y) : nullptr;
        if (!begin_at) {
          const V start = splat(a.bias ? a.bias[o] : 0.f);
#pragma GCC unroll 32
          for (int i = 0; i < R * Q; ++i) acc[i] = start;
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int q = 0; q < Q; ++q) acc[r * Q + q] = load(begin_at + r * y_row + q * y_pix);
        }
        for (int32_t k = k0; k < k1; ++k) {
          const float* p = in_register(in + off[k]);
          const V v = splat(val[k]);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int q = 0; q < Q; ++q) acc[r * Q + q] += v * load(p + q * x_pix);
            if (r + 1 < R) p = in_register(p + x_row);
          }
        }
        finish<R, Q>(a, o, sub, a.fresh && row == 0 && col == 0, last, out, acc);
      }
    }
  }
}

template <int R, int Q, int S>
static void grad_block(const RowsArgs& a, int row, int col) {
  const int64_t x_pix = S ? S : a.x_pix, x_row = a.x_row, y_pix = a.y_pix, y_row = a.y_row;
  const int32_t* const off = a.off;
  const float* x = a.x + row * x_row + col * x_pix;
  const float* y = a.y + row * y_row + col * y_pix;
  for (int b = 0; b < a.blocks; ++b) {
    const int32_t* begin = a.seg + int64_t(b) * a.outputs;
    const int32_t* end = begin + a.outputs;
    for (int o = a.out0; o < a.out1; ++o) {
      const int32_t k0 = begin[o], k1 = end[o];
      if (k0 == k1) continue;
      for (int sub = 0; sub < kSub; ++sub) {
        const float* grad = y + o * a.y_plane + sub * PST_W;
        const float* in = x + sub * PST_W;
        float* out = a.acc - a.acc0 * kLanes + sub * PST_W;
        V g[R * Q];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
          for (int q = 0; q < Q; ++q) g[r * Q + q] = load(grad + r * y_row + q * y_pix);
        for (int32_t k = k0; k < k1; ++k) {
          const float* p = in_register(in + off[k]);
          // two chains halve the latency of the sum
          V even = load(out + int64_t(k) * kLanes), odd = V{};
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int q = 0; q < Q; ++q) {
              const V product = g[r * Q + q] * load(p + q * x_pix);
              if ((r * Q + q) % 2)
                odd += product;
              else
                even += product;
            }
            if (r + 1 < R) p = in_register(p + x_row);
          }
          store(out + int64_t(k) * kLanes, even + odd);
        }
      }
    }
  }
}

typedef void (*Block)(const RowsArgs&, int, int);

constexpr int kMaxCols = 8;
constexpr int kMaxRows = PST_REGS >= 16 ? 4 : 2;
// as many rows as the registers hold
constexpr int rows_that_fit(int q) { return PST_REGS / q < kMaxRows ? (PST_REGS / q < 1 ? 1 : PST_REGS / q) : kMaxRows; }
constexpr int fit(int r, int q) { return r <= rows_that_fit(q) ? r : rows_that_fit(q); }

#define PST_ROW(f, q, S) {f<1, q, S>, f<fit(2, q), q, S>, f<fit(3, q), q, S>, f<fit(4, q), q, S>}
#define PST_TABLE(f, S) \
  {PST_ROW(f, 1, S), PST_ROW(f, 2, S), PST_ROW(f, 3, S), PST_ROW(f, 4, S), PST_ROW(f, 5, S), PST_ROW(f, 6, S), \
   PST_ROW(f, 7, S), PST_ROW(f, 8, S)}
static const Block kRows[3][kMaxCols][4] = {PST_TABLE(rows_block, 16), PST_TABLE(rows_block, 32), PST_TABLE(rows_block, 0)};
static const Block kGrad[3][kMaxCols][4] = {PST_TABLE(grad_block, 16), PST_TABLE(grad_block, 32), PST_TABLE(grad_block, 0)};

static void walk(const RowsArgs& a, const Block table[3][kMaxCols][4]) {
  const int step = a.x_pix == 16 ? 0 : a.x_pix == 32 ? 1 : 2;
  const int pieces = (a.cols + kMaxCols - 1) / kMaxCols;
  // rows outside: memory is then read and written along whole rows, which the hardware prefetches
  for (int row = a.row0; row < a.row1;) {
    int r = kMaxRows;
    for (int piece = 0, col = 0; piece < pieces; ++piece) {
      const int q = (a.cols - col + pieces - piece - 1) / (pieces - piece);
      if (piece == 0) r = a.row1 - row < rows_that_fit(q) ? a.row1 - row : rows_that_fit(q);
      table[step][q - 1][r - 1](a, row, col);
      col += q;
    }
    row += r;
  }
}

static void rows(const RowsArgs& a) { walk(a, kRows); }
static void weight_grad(const RowsArgs& a) { walk(a, kGrad); }

static void reduce(const float* acc, float* out, int64_t count) {
  for (int64_t k = 0; k < count; k += PST_W) {
    const int n = count - k < PST_W ? int(count - k) : PST_W;
    V r[PST_W];
#pragma GCC unroll 16
    for (int i = 0; i < PST_W; ++i) {
      const float* from = acc + (k + (i < n ? i : 0)) * kLanes;
      r[i] = load(from);
      for (int sub = 1; sub < kSub; ++sub) r[i] += load(from + sub * PST_W);
    }
    const V sum = reduce_rows(r);
    if (n == PST_W)
      store(out + k, load(out + k) + sum);
    else
      for (int i = 0; i < n; ++i) out[k + i] += sum[i];
  }
}

template <class T>
static void pack_lines(const T* src, int64_t sample_stride, int lanes, float* dst, const int32_t* table, int64_t count) {
  for (int64_t j = 0; j < count; j += PST_W) {
    const int n = count - j < PST_W ? int(count - j) : PST_W;
    for (int sub = 0; sub < kSub; ++sub) {
      V r[PST_W];
      if (n == PST_W && lanes >= (sub + 1) * PST_W) {
#pragma GCC unroll 16
        for (int i = 0; i < PST_W; ++i) r[i] = load(src + (sub * PST_W + i) * sample_stride + j);
      } else {
        T part[PST_W * PST_W] = {};
        for (int i = 0; i < PST_W && sub * PST_W + i < lanes; ++i)
          for (int l = 0; l < n; ++l) part[i * PST_W + l] = src[(sub * PST_W + i) * sample_stride + j + l];
        for (int i = 0; i < PST_W; ++i) r[i] = load(part + i * PST_W);
      }
      transpose(r);
      float* to = dst + sub * PST_W;
      if (n == PST_W) {
#pragma GCC unroll 16
        for (int i = 0; i < PST_W; ++i) store(to + table[j + i], r[i]);
      } else {
        for (int i = 0; i < n; ++i) store(to + table[j + i], r[i]);
      }
    }
  }
}

static void pack(const void* src, bool half, int64_t sample_stride, int lanes, float* dst, const int32_t* table, int64_t count) {
  if (half)
    pack_lines(static_cast<const bf16*>(src), sample_stride, lanes, dst, table, count);
  else
    pack_lines(static_cast<const float*>(src), sample_stride, lanes, dst, table, count);
}

template <class T>
static void unpack_lines(const float* src, const int32_t* table, T* dst, int64_t sample_stride, int lanes, int64_t count) {
  for (int64_t j = 0; j < count; j += PST_W) {
    const int n = count - j < PST_W ? int(count - j) : PST_W;
    for (int sub = 0; sub < kSub && sub * PST_W < lanes; ++sub) {
      const float* from = src + sub * PST_W;
      V r[PST_W];
      if (n == PST_W) {
#pragma GCC unroll 16
        for (int i = 0; i < PST_W; ++i) r[i] = load(from + table[j + i]);
      } else {
        for (int i = 0; i < PST_W; ++i) r[i] = i < n ? load(from + table[j + i]) : V{};
      }
      transpose(r);
      T* to = dst + sub * PST_W * sample_stride + j;
      if (n == PST_W && lanes >= (sub + 1) * PST_W) {
#pragma GCC unroll 16
        for (int i = 0; i < PST_W; ++i) store(to + i * sample_stride, r[i]);
      } else {
        T part[PST_W];
        for (int i = 0; i < PST_W && sub * PST_W + i < lanes; ++i) {
          store(part, r[i]);
          for (int l = 0; l < n; ++l) to[i * sample_stride + l] = part[l];
        }
      }
    }
  }
}

static void unpack(const float* src, const int32_t* table, void* dst, bool half, int64_t sample_stride, int lanes, int64_t count) {
  if (half)
    unpack_lines(src, table, static_cast<bf16*>(dst), sample_stride, lanes, count);
  else
    unpack_lines(src, table, static_cast<float*>(dst), sample_stride, lanes, count);
}

#include "cpu/tiled_norm.inl"

static const TileKernels kKernels = {kMaxRows, kMaxCols, rows,      weight_grad, reduce,   pack,
                                     unpack,   norm_act, norm_sums, norm_grad,   plane_sum};
