// Kernels of masked_linear.h for one instruction set; PST_W floats a register.
#include "cpu/vec.h"

// rows and vectors of samples whose sums are in registers together: 16 of 32 registers, or 8 of 16
constexpr int ROWS = W == 16 ? 4 : 1;
constexpr int SUMS = W == 16 ? 4 : 8;
constexpr int UNIT = 16 / W;  // vectors in 16 lanes

template <class T>
static void pack_tile(const T* src, const T* gate, int64_t ld, int samples, int lanes, int k0, int k1, float* dst,
                      float* column_sums) {
  for (int lane = 0; lane < lanes; lane += W) {
    const int rows = samples - lane < W ? (samples > lane ? samples - lane : 0) : W;
    for (int k = k0; k < k1; k += W) {
      const int columns = k1 - k < W ? k1 - k : W;
      V v[W];
      if (rows == W && columns == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = load(src + (lane + i) * ld + k);
        if (gate) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) v[i] = load(gate + (lane + i) * ld + k) > 0 ? v[i] : V{};
        }
      } else {
        for (int i = 0; i < W; ++i) {
          T row[W] = {}, open[W] = {};
          if (i < rows) {
            __builtin_memcpy(row, src + (lane + i) * ld + k, columns * sizeof(T));
            if (gate) __builtin_memcpy(open, gate + (lane + i) * ld + k, columns * sizeof(T));
          }
          v[i] = gate ? (load(open) > 0 ? load(row) : V{}) : load(row);
        }
      }
      if (column_sums) {
        V sum = v[0];
#pragma GCC unroll 16
        for (int i = 1; i < W; ++i) sum += v[i];
        if (columns == W) {
          store(column_sums + k, load(column_sums + k) + sum);
        } else {
          for (int c = 0; c < columns; ++c) column_sums[k + c] += sum[c];
        }
      }
      transpose(v);
      if (columns == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(dst + int64_t(k + i) * lanes + lane, v[i]);
      } else {
        for (int i = 0; i < columns; ++i) store(dst + int64_t(k + i) * lanes + lane, v[i]);
      }
    }
  }
}

static void pack(Scalar type, const void* src, const void* gate, int64_t ld, int samples, int lanes, int k0, int k1,
                 float* dst, float* column_sums) {
  if (type == Scalar::f32) {
    pack_tile(static_cast<const float*>(src), static_cast<const float*>(gate), ld, samples, lanes, k0, k1, dst, column_sums);
  } else {
    pack_tile(static_cast<const bf16*>(src), static_cast<const bf16*>(gate), ld, samples, lanes, k0, k1, dst, column_sums);
  }
}

template <class T>
static void unpack_tile(const float* src, int lanes, int samples, int r0, int r1, bool relu, T* dst, int64_t ld) {
  for (int lane = 0; lane < samples; lane += W) {
    const int valid = samples - lane < W ? samples - lane : W;
    for (int r = r0; r < r1; r += W) {
      const int rows = r1 - r < W ? r1 - r : W;
      V v[W];
      if (rows == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = load(src + int64_t(r + i) * lanes + lane);
      } else {
        for (int i = 0; i < W; ++i) v[i] = i < rows ? load(src + int64_t(r + i) * lanes + lane) : V{};
      }
      if (relu) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = v[i] < 0 ? V{} : v[i];
      }
      transpose(v);
      if (rows == W && valid == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(dst + (lane + i) * ld + r, v[i]);
      } else {
        for (int i = 0; i < valid; ++i) {
          T row[W];
          store(row, v[i]);
          __builtin_memcpy(dst + (lane + i) * ld + r, row, rows * sizeof(T));
        }
      }
    }
  }
}

static void unpack(Scalar type, const float* src, int lanes, int samples, int r0, int r1, bool relu, void* dst,
                   int64_t ld) {
  if (type == Scalar::f32) {
    unpack_tile(src, lanes, samples, r0, r1, relu, static_cast<float*>(dst), ld);
  } else {
    unpack_tile(src, lanes, samples, r0, r1, relu, static_cast<bf16*>(dst), ld);
  }
}

static void gate(const float* src, const float* gate, int lanes, int k0, int k1, float* dst, float* column_sums) {
  for (int k = k0; k < k1; k += W) {
    const int columns = k1 - k < W ? k1 - k : W;
    V sums[W] = {};
    for (int i = 0; i < columns; ++i) {
      const int64_t at = int64_t(k + i) * lanes;
      V sum = {};
      for (int lane = 0; lane < lanes; lane += W) {
        V v = load(src + at + lane);
        if (gate) {
          v = load(gate + at + lane) > 0 ? v : V{};
          store(dst + at + lane, v);
        }
        sum += v;
      }
      sums[i] = sum;
    }
    if (!column_sums) continue;
    const V total = reduce_rows(sums);
    for (int i = 0; i < columns; ++i) column_sums[k + i] += total[i];
  }
}

static void relu(float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    const V v = load(y + i);
    store(y + i, v < 0 ? V{} : v);
  }
}

template <int N>
PST_INLINE void add_products(V* sums, float weight, const float* x) {
  const V w = splat(weight);
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) sums[v] += w * load(x + v * W);
}

// rows [i, i + R) of a group
template <int R, int N, int WIDTH>
PST_INLINE void multiply_rows(const int32_t* row, int length, const uint16_t* column, const float* weights,
                              const float* bias, bool first, const float* x, int64_t lanes, float* y) {
  V sums[R][N];
  float* out[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    out[r] = y + row[r] * lanes;
    const V start = splat(first && bias ? bias[row[r]] : 0);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sums[r][v] = first ? start : load(out[r] + v * W);
  }
  for (int j = 0; j < length; ++j, column += WIDTH, weights += WIDTH) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) add_products<N>(sums[r], weights[r], x + column[r] * lanes);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(out[r] + v * W, sums[r][v]);
  }
}

// the next `share` floats of a stretch of memory into L2
PST_INLINE void prefetch_share(const float*& from, const float* end, int64_t share) {
  const float* stop = end - from < share ? end : from + share;
  for (; from < stop; from += 16) __builtin_prefetch(from, 0, 2);
}

PST_INLINE int64_t share_of(const Ahead& ahead, int64_t groups) {
  return groups ? (ahead.floats / groups + 15) / 16 * 16 : 0;
}

template <int N>
static void multiply_lanes(const Group* g, const Group* end, const uint16_t* column, const float* weights,
                           const float* bias, bool first, const float* x, int64_t lanes, float* y, Ahead ahead) {
  const float *at = ahead.from, *stop = ahead.from + ahead.floats;
  const int64_t share = share_of(ahead, end - g);
  for (; g < end; ++g) {
    prefetch_share(at, stop, share);
    // the next group's sums, which the last column tile left in L2
    const Group* next = g + 1 < end ? g + 1 : g;
#pragma GCC unroll 4
    for (int r = 0; r < GROUP; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < N; v += UNIT) __builtin_prefetch(y + next->row[r] * lanes + v * W, 1, 3);
    }
    if (g->width == GROUP) {
#pragma GCC unroll 4
      for (int i = 0; i < GROUP; i += ROWS)
        multiply_rows<ROWS, N, GROUP>(g->row + i, g->length, column + i, weights + i, bias, first, x, lanes, y);
    } else {
      multiply_rows<1, N, 1>(g->row, g->length, column, weights, bias, first, x, lanes, y);
    }
    column += g->length * g->width;
    weights += g->length * g->width;
  }
}

// calls f with the number of vectors for each stretch of at most SUMS vectors of the lanes
template <class F>
PST_INLINE void for_lanes(int lanes, F f) {
  int lane = 0;
  for (; lane + SUMS * W <= lanes; lane += SUMS * W) f(std::integral_constant<int, SUMS>(), lane);
  const int units = (lanes - lane) / 16;
  if constexpr (SUMS > UNIT)
    if (units == 1) f(std::integral_constant<int, UNIT>(), lane);
  if constexpr (SUMS > 2 * UNIT)
    if (units == 2) f(std::integral_constant<int, 2 * UNIT>(), lane);
  if constexpr (SUMS > 3 * UNIT)
    if (units == 3) f(std::integral_constant<int, 3 * UNIT>(), lane);
}

static void multiply(const Schedule& s, int column_tile, int chunk, const float* weights, const float* bias,
                     const float* x, int lanes, float* y, Ahead ahead) {
  const int cell = s.cell(column_tile, chunk), entry = s.position[cell];
  x += int64_t(column_tile) * s.columns * lanes;
  for_lanes(lanes, [&](auto n, int lane) {
    multiply_lanes<decltype(n)::value>(s.groups + s.first[cell], s.groups + s.first[cell + 1], s.column + entry,
                                       weights + entry, bias, column_tile == 0, x + lane, lanes, y + lane,
                                       lane ? Ahead() : ahead);
  });
}

// vectors of partial sums between two reductions: 4 KB, a multiple of GROUP * W
constexpr int PARTIALS = 64;

struct Partials {
  alignas(64) V sums[PARTIALS];
  int held = 0;
  float* out;

  PST_INLINE void reduce() {
    for (; held & (W - 1); ++held) sums[held] = V{};
    for (int p = 0; p < held; p += W, out += W) {
      V v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = sums[p + i];
      store(out, load(out) + reduce_rows(v));
    }
    held = 0;
  }
};

template <int R, int N>
PST_INLINE void sample_rows(const Group& g, const uint16_t* column, const float* x, const float* dy, int64_t lanes,
                            Partials& partials) {
  V d[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) d[r][v] = load(dy + g.row[r] * lanes + v * W);
  }
  for (int j = 0; j < g.length;) {
    const int room = (PARTIALS - partials.held) / R, stop = g.length - j < room ? g.length : j + room;
    V* to = partials.sums + partials.held;
    partials.held += (stop - j) * R;
    for (; j < stop; ++j, column += R, to += R) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const float* p = x + column[r] * lanes;
        V sum = d[r][0] * load(p);
#pragma GCC unroll 8
        for (int v = 1; v < N; ++v) sum += d[r][v] * load(p + v * W);
        to[r] = sum;
      }
    }
    if (partials.held + R > PARTIALS) partials.reduce();
  }
}

template <int N>
static void sample_lanes(const Group* g, const Group* end, const uint16_t* column, const float* x, const float* dy,
                         int64_t lanes, float* products, Ahead x_ahead, Ahead dy_ahead) {
  Partials partials;
  partials.out = products;
  const float *x_at = x_ahead.from, *x_stop = x_ahead.from + x_ahead.floats;
  const float *dy_at = dy_ahead.from, *dy_stop = dy_ahead.from + dy_ahead.floats;
  const int64_t x_share = share_of(x_ahead, end - g), dy_share = share_of(dy_ahead, end - g);
  for (; g < end; ++g) {
    prefetch_share(x_at, x_stop, x_share);
    prefetch_share(dy_at, dy_stop, dy_share);
    if (g->width == GROUP) {
      sample_rows<GROUP, N>(*g, column, x, dy, lanes, partials);
    } else {
      sample_rows<1, N>(*g, column, x, dy, lanes, partials);
    }
    column += g->length * g->width;
  }
  partials.reduce();
}

static void sample(const Schedule& s, int column_tile, int chunk, const float* x, const float* dy, int lanes,
                   float* products, Ahead x_ahead, Ahead dy_ahead) {
  const int cell = s.cell(column_tile, chunk), entry = s.position[cell];
  x += int64_t(column_tile) * s.columns * lanes;
  for_lanes(lanes, [&](auto n, int lane) {
    sample_lanes<decltype(n)::value>(s.groups + s.first[cell], s.groups + s.first[cell + 1], s.column + entry, x + lane,
                                     dy + lane, lanes, products + entry, lane ? Ahead() : x_ahead, lane ? Ahead() : dy_ahead);
  });
}

static void gather(const float* values, const int32_t* source, int64_t begin, int64_t end, float* weights) {
  for (int64_t e = begin; e < end; ++e) weights[e] = source[e] < 0 ? 0 : values[source[e]];
}

constexpr LinearKernels KERNELS = {pack, unpack, gate, relu, multiply, sample, gather};
