// Kernels of masked_linear.h for one instruction set; PST_W floats a register.
#include "cpu/vec.h"

// rows and vectors of samples whose sums are in registers together: 16 of 32 registers, or 8 of 16
constexpr int ROWS = W == 16 ? 4 : 1;
constexpr int SUMS = W == 16 ? 4 : 8;
constexpr int UNIT = 16 / W;  // vectors in 16 lanes
// vectors of samples of GROUP rows, in a shared group, and columns whose products are summed together
constexpr int SHARED_SUMS = W == 16 ? 4 : 2;
constexpr int SHARED_COLUMNS = W / GROUP;

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

// sums[row] += weights[row] * a column of x: GROUP + N loads for GROUP * N multiply-adds
template <int N>
PST_INLINE void add_column(V (*sums)[N], const float* weights, const float* x) {
  V in[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) in[v] = load(x + v * W);
#pragma GCC unroll 4
  for (int r = 0; r < GROUP; ++r) {
    const V w = splat(weights[r]);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[r][v] += w * in[v];
  }
}

// GROUP neighbouring rows from `row` on; columns(sums) adds what they share
template <int N, class F>
PST_INLINE void multiply_shared(int32_t row, const float* bias, bool first, int64_t lanes, float* y, F columns) {
  V sums[GROUP][N];
  float* out = y + row * lanes;
#pragma GCC unroll 4
  for (int r = 0; r < GROUP; ++r) {
    const V start = splat(first && bias ? bias[row + r] : 0);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[r][v] = first ? start : load(out + r * lanes + v * W);
  }
  columns(sums);
#pragma GCC unroll 4
  for (int r = 0; r < GROUP; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(out + r * lanes + v * W, sums[r][v]);
  }
}

template <int N>
static void multiply_exact(const Exact& e, const Run* run, const float* weights, const float* bias, bool first,
                           const float* x, int64_t lanes, float* y) {
  multiply_shared<N>(e.row, bias, first, lanes, y, [&](V(*sums)[N]) __attribute__((always_inline)) {
    for (const Run* end = run + e.runs; run < end; ++run) {
      const float* at = x + run->column * lanes;
#pragma GCC unroll 4
      for (int j = 0; j < run->length; ++j, at += lanes, weights += GROUP) add_column<N>(sums, weights, at);
    }
  });
}

template <int N>
static void multiply_columns(const Group& g, const uint16_t* column, const float* weights, const float* bias, bool first,
                             const float* x, int64_t lanes, float* y) {
  multiply_shared<N>(g.row[0], bias, first, lanes, y, [&](V(*sums)[N]) __attribute__((always_inline)) {
    for (int j = 0; j < g.length; ++j, weights += GROUP) add_column<N>(sums, weights, x + column[j * GROUP] * lanes);
  });
}

// all exact groups of a cell, then its shared ones
template <int N>
static void multiply_blocks(const Schedule& s, int column_tile, int chunk, const float* weights, const float* bias,
                            const float* x, int64_t lanes, float* y) {
  constexpr int S = N < SHARED_SUMS ? N : SHARED_SUMS;
  static_assert(N % S == 0);
  const bool first = column_tile == 0;
  const int part = s.part(column_tile, chunk, Schedule::STRIPS), cell = part / Schedule::PARTS;
  const Exact* stop = s.exact + s.exact_first[cell + 1];
  for (const Exact* e = s.exact + s.exact_first[cell]; e < stop; ++e)
    for (int v = 0; v < N; v += S)
      multiply_exact<S>(*e, s.exact_run + e->run, weights + s.entries() + e->weights, bias, first, x + v * W, lanes,
                        y + v * W);
  for (int i = part; i < s.part(column_tile, chunk, Schedule::REST); ++i) {
    int64_t entry = s.position[i];
    for (const Group* g = s.groups + s.first[i]; g < s.groups + s.first[i + 1]; entry += g->entries(), ++g)
      for (int v = 0; v < N; v += S)
        multiply_columns<S>(*g, s.column + entry, weights + entry, bias, first, x + v * W, lanes, y + v * W);
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
    column += g->entries();
    weights += g->entries();
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
  const int rest = s.part(column_tile, chunk, Schedule::REST);
  x += int64_t(column_tile) * s.columns * lanes;
  for_lanes(lanes, [&](auto n, int lane) {
    constexpr int N = decltype(n)::value;
    multiply_blocks<N>(s, column_tile, chunk, weights, bias, x + lane, lanes, y + lane);
    multiply_lanes<N>(s.groups + s.first[rest], s.groups + s.first[rest + 1], s.column + s.position[rest],
                      weights + s.position[rest], bias, column_tile == 0, x + lane, lanes, y + lane,
                      lane ? Ahead() : ahead);
  });
}

// GROUP vectors to one that holds a sum of W / GROUP lanes for each
PST_INLINE V reduce_group(V* v) {
  reduce_step<2>(v);
  reduce_step<1>(v);
  return v[0];
}

// vectors of reduce_group to one that holds all sums of GROUP lanes
template <int S>
PST_INLINE void reduce_groups_step(V* v) {
  using Lanes = std::make_index_sequence<W>;
  constexpr int STEP = S / GROUP;
#pragma GCC unroll 2
  for (int i = 0; i < STEP; ++i)
    v[i] = keep_blocks<S>(v[i], v[i + STEP], Lanes()) + swap_blocks<S>(v[i], v[i + STEP], Lanes());
}

// Sums of GROUP entries each, partly reduced: 4 KB
constexpr int PARTIALS = 64;

struct Partials {
  static constexpr int TOGETHER = W / GROUP;
  alignas(64) V sums[PARTIALS];
  int held = 0;
  float* out;

  PST_INLINE void reduce() {
    for (; held % TOGETHER; ++held) sums[held] = V{};
    for (int p = 0; p < held; p += TOGETHER, out += W) {
      V v[TOGETHER];
#pragma GCC unroll 4
      for (int i = 0; i < TOGETHER; ++i) v[i] = sums[p + i];
      if constexpr (W >= 16) reduce_groups_step<8>(v);
      if constexpr (W >= 8) reduce_groups_step<4>(v);
      store(out, load(out) + v[0]);
    }
    held = 0;
  }
};

// a group of GROUP rows, or of one row: GROUP entries at a time
template <int R, int N>
PST_INLINE void sample_rows(const Group& g, const uint16_t* column, const float* x, const float* dy, int64_t lanes,
                            Partials& partials) {
  V d[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) d[r][v] = load(dy + g.row[r] * lanes + v * W);
  }
  for (int left = g.entries() / GROUP; left;) {
    const int room = PARTIALS - partials.held, count = left < room ? left : room;
    V* to = partials.sums + partials.held;
    for (const V* stop = to + count; to < stop; ++to, column += GROUP) {
      V sums[GROUP];
#pragma GCC unroll 4
      for (int i = 0; i < GROUP; ++i) {
        const V* row = d[R == 1 ? 0 : i];
        const float* p = x + column[i] * lanes;
        sums[i] = row[0] * load(p);
#pragma GCC unroll 8
        for (int v = 1; v < N; ++v) sums[i] += row[v] * load(p + v * W);
      }
      *to = reduce_group(sums);
    }
    partials.held += count;
    left -= count;
    if (partials.held == PARTIALS) partials.reduce();
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
    column += g->entries();
  }
  partials.reduce();
}

static void sample(const Schedule& s, int column_tile, int chunk, const float* x, const float* dy, int lanes,
                   float* products, Ahead x_ahead, Ahead dy_ahead) {
  const int rest = s.part(column_tile, chunk, Schedule::REST), entry = s.position[rest];
  x += int64_t(column_tile) * s.columns * lanes;
  for_lanes(lanes, [&](auto n, int lane) {
    sample_lanes<decltype(n)::value>(s.groups + s.first[rest], s.groups + s.first[rest + 1], s.column + entry, x + lane,
                                     dy + lane, lanes, products + entry, lane ? Ahead() : x_ahead, lane ? Ahead() : dy_ahead);
  });
}

#include "cpu/shared_gradient.inl"

static void gather(const float* values, const int32_t* source, int64_t begin, int64_t end, float* weights) {
  int64_t e = begin;
#if PST_W == 16
  for (; e + W <= end; e += W) {
    const __m512i at = _mm512_loadu_si512(source + e);
    const __mmask16 real = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
    _mm512_storeu_ps(weights + e, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), real, at, values, 4));
  }
#endif
  for (; e < end; ++e) weights[e] = source[e] < 0 ? 0 : values[source[e]];
}

static void gather_exact(const Schedule& s, const float* values, int64_t begin, int64_t end, float* weights) {
  typedef float Four __attribute__((vector_size(16)));
  typedef float FourU __attribute__((vector_size(16), aligned(4), may_alias));
  for (const Exact* e = s.exact + begin; e < s.exact + end; ++e) {
    const int32_t* at = s.exact_at + e->at;
    float* to = weights + s.entries() + e->weights;
    const auto put = [&](int j, Four v) __attribute__((always_inline)) { *reinterpret_cast<FourU*>(to + j * GROUP) = v; };
    if (s.by_columns) {
      for (int j = 0; j < e->columns; ++j) put(j, *reinterpret_cast<const FourU*>(values + at[j]));
      continue;
    }
    const float* row[GROUP] = {values + at[0], values + at[1], values + at[2], values + at[3]};
    int j = 0;
    for (; j + 4 <= e->columns; j += 4) {
      Four a[GROUP];
#pragma GCC unroll 4
      for (int r = 0; r < GROUP; ++r) a[r] = *reinterpret_cast<const FourU*>(row[r] + j);
      const Four l0 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5), h0 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
      const Four l1 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5), h1 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
      put(j, __builtin_shufflevector(l0, l1, 0, 1, 4, 5));
      put(j + 1, __builtin_shufflevector(l0, l1, 2, 3, 6, 7));
      put(j + 2, __builtin_shufflevector(h0, h1, 0, 1, 4, 5));
      put(j + 3, __builtin_shufflevector(h0, h1, 2, 3, 6, 7));
    }
    for (; j < e->columns; ++j) put(j, Four{row[0][j], row[1][j], row[2][j], row[3][j]});
  }
}

constexpr LinearKernels KERNELS = {pack,          unpack, gate,        relu, multiply, sample, sample_shared,
                                   sample_strips, gather, gather_exact};
