// Kernels of masked_linear.h for one instruction set; PST_W floats a register.
#include "cpu/vec.h"

// how many sums one row keeps in registers, and whether two rows fit side by side
constexpr int SUMS = W == 16 ? 4 : 8;
constexpr bool PAIRS = W == 16;
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

template <int N>
PST_INLINE void add_products(V* sums, float weight, const float* x) {
  const V w = splat(weight);
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) sums[v] += w * load(x + v * W);
}

template <int N>
static void multiply_lanes(const Segment* s, int count, const int32_t* col, const float* values, const float* bias,
                           bool first, const float* x, int64_t lanes, float* y) {
  const auto start = [&](V* sums, const Segment& seg) {
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) sums[v] = first ? splat(bias ? bias[seg.row] : 0) : load(y + seg.row * lanes + v * W);
  };
  const auto finish = [&](const V* sums, const Segment& seg) {
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) store(y + seg.row * lanes + v * W, sums[v]);
  };
  int i = 0;
  if constexpr (PAIRS) {
    for (; i + 1 < count; i += 2) {
      const Segment a = s[i], b = s[i + 1];  // b is not the longer one
      V sa[N], sb[N];
      start(sa, a);
      start(sb, b);
      const int32_t *ca = col + a.start, *cb = col + b.start;
      const float *va = values + a.start, *vb = values + b.start;
      int j = 0;
      for (; j < b.length; ++j) {
        add_products<N>(sa, va[j], x + ca[j] * lanes);
        add_products<N>(sb, vb[j], x + cb[j] * lanes);
      }
      for (; j < a.length; ++j) add_products<N>(sa, va[j], x + ca[j] * lanes);
      finish(sa, a);
      finish(sb, b);
    }
  }
  for (; i < count; ++i) {
    V sums[N];
    start(sums, s[i]);
    for (int j = s[i].start; j < s[i].start + s[i].length; ++j) add_products<N>(sums, values[j], x + col[j] * lanes);
    finish(sums, s[i]);
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

static void multiply(const Schedule& s, int column_tile, int chunk, const int32_t* col, const float* values,
                     const float* bias, const float* x, int lanes, float* y) {
  const int cell = s.cell(column_tile, chunk);
  const Segment* segments = s.segments + s.first[cell];
  const int count = s.first[cell + 1] - s.first[cell];
  for_lanes(lanes, [&](auto n, int lane) {
    multiply_lanes<decltype(n)::value>(segments, count, col, values, bias, column_tile == 0, x + lane, lanes, y + lane);
  });
}

constexpr int PRODUCTS = 64;  // vectors of partial sums between two reductions: 4 KB

template <int N>
static void sample_lanes(const Segment* s, int count, const int32_t* col, const float* x, const float* dy, int64_t lanes,
                         float* products) {
  alignas(64) V partial[PRODUCTS];
  int held = 0;
  const auto reduce = [&] {
    for (; held & (W - 1); ++held) partial[held] = V{};
    for (int p = 0; p < held; p += W, products += W) {
      V v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = partial[p + i];
      store(products, load(products) + reduce_rows(v));
    }
    held = 0;
  };
  for (int i = 0; i < count; ++i) {
    V d[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) d[v] = load(dy + s[i].row * lanes + v * W);
    for (int j = s[i].start, end = j + s[i].length; j < end;) {
      const int stop = end - j < PRODUCTS - held ? end : j + PRODUCTS - held;
      for (; j < stop; ++j) {
        const float* p = x + col[j] * lanes;
        V sum = d[0] * load(p);
#pragma GCC unroll 16
        for (int v = 1; v < N; ++v) sum += d[v] * load(p + v * W);
        partial[held++] = sum;
      }
      if (held == PRODUCTS) reduce();
    }
  }
  reduce();
}

static void sample(const Schedule& s, int column_tile, int chunk, const int32_t* col, const float* x, const float* dy,
                   int lanes, float* products) {
  const int cell = s.cell(column_tile, chunk);
  const Segment* segments = s.segments + s.first[cell];
  const int count = s.first[cell + 1] - s.first[cell];
  for_lanes(lanes, [&](auto n, int lane) {
    sample_lanes<decltype(n)::value>(segments, count, col, x + lane, dy + lane, lanes, products + s.position[cell]);
  });
}

static void gather(const float* values, const int32_t* index, int64_t begin, int64_t end, float* out) {
  for (int64_t j = begin; j < end; ++j) out[j] = values[index[j]];
}

constexpr LinearKernels KERNELS = {pack, unpack, multiply, sample, gather};
