// Kernels of pixel_kernels.h for one instruction set (each_isa.inl).
#include "cpu/vec.h"

constexpr int kRegisters = PST_REGS;

template <class T>
PST_INLINE void store_first(T* p, V v, int64_t count) {
  T lanes[W];
  store(lanes, v);
  __builtin_memcpy(p, lanes, size_t(count) * sizeof(T));
}

template <class T>
PST_INLINE V load_first(const T* p, int64_t count) {
  T lanes[W] = {};
  __builtin_memcpy(lanes, p, size_t(count) * sizeof(T));
  return load(lanes);
}

template <int R, int Q, class T>
PST_INLINE void store_block(T* y, int64_t sample, int64_t last, const V* acc) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int q = 0; q + 1 < Q; ++q) store(y + r * sample + q * W, acc[r * Q + q]);
    T* const end = y + r * sample + (Q - 1) * W;
    if (last >= W)
      store(end, acc[r * Q + Q - 1]);
    else
      store_first(end, acc[r * Q + Q - 1], last);
  }
}

template <int R, int Q, class T>
PST_INLINE void load_block(const T* y, int64_t sample, int64_t last, V* g) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int q = 0; q + 1 < Q; ++q) g[r * Q + q] = load(y + r * sample + q * W);
    const T* const end = y + r * sample + (Q - 1) * W;
    g[r * Q + Q - 1] = last >= W ? load(end) : load_first(end, last);
  }
}

// R samples x Q vectors of pixels from pixel p0 on
template <int R, int Q>
static void rows_block(const PixelArgs& a, int64_t sample, int64_t p0) {
  const int64_t x_sample = a.x_sample, last = a.pixels - p0 - (Q - 1) * W;
  const int32_t* const off = a.off;
  const float* const val = a.val;
  const float* const x = a.x + sample * x_sample + p0;
  for (int b = 0; b < a.blocks; ++b) {
    const int32_t* begin = a.seg + int64_t(b) * a.outputs;
    const int32_t* end = begin + a.outputs;
    const bool final = b + 1 == a.blocks;
    for (int o = a.out0; o < a.out1; ++o) {
      const int32_t k0 = begin[o], k1 = end[o];
      if (b && k0 == k1 && !final) continue;
      float* const part = a.part + int64_t(o - a.out0) * kRegisters * W;
      V acc[R * Q];
      if (b == 0) {
        const V start = splat(a.bias ? a.bias[o] : 0.f);
#pragma GCC unroll 16
        for (int i = 0; i < R * Q; ++i) acc[i] = start;
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < R * Q; ++i) acc[i] = load(part + i * W);
      }
      for (int32_t k = k0; k < k1; ++k) {
        const float* p = in_register(x + off[k]);
        const V v = splat(val[k]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
          for (int q = 0; q < Q; ++q) acc[r * Q + q] += v * load(p + q * W);
          if (r + 1 < R) p = in_register(p + x_sample);
        }
      }
      if (!final) {
#pragma GCC unroll 16
        for (int i = 0; i < R * Q; ++i) store(part + i * W, acc[i]);
      } else {
        const int64_t at = sample * a.y_sample + o * a.y_plane + p0;
        if (a.half)
          store_block<R, Q>(static_cast<bf16*>(a.y) + at, a.y_sample, last, acc);
        else
          store_block<R, Q>(static_cast<float*>(a.y) + at, a.y_sample, last, acc);
      }
    }
  }
}

template <int R, int Q>
static void grad_block(const PixelArgs& a, int64_t sample, int64_t p0) {
  const int64_t x_sample = a.x_sample, last = a.pixels - p0 - (Q - 1) * W;
  const int32_t* const off = a.off;
  const float* const x = a.x + sample * x_sample + p0;
  float* const sums = a.acc - a.acc0 * W;
  for (int b = 0; b < a.blocks; ++b) {
    const int32_t* begin = a.seg + int64_t(b) * a.outputs;
    const int32_t* end = begin + a.outputs;
    for (int o = a.out0; o < a.out1; ++o) {
      const int32_t k0 = begin[o], k1 = end[o];
      if (k0 == k1) continue;
      V g[R * Q];
      const int64_t at = sample * a.y_sample + o * a.y_plane + p0;
      if (a.half)
        load_block<R, Q>(static_cast<const bf16*>(a.y) + at, a.y_sample, last, g);
      else
        load_block<R, Q>(static_cast<const float*>(a.y) + at, a.y_sample, last, g);
      for (int32_t k = k0; k < k1; ++k) {
        const float* p = in_register(x + off[k]);
        // two chains halve the latency of the sum
        V even = load(sums + int64_t(k) * W), odd = V{};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
          for (int q = 0; q < Q; ++q) {
            if ((r * Q + q) % 2)
              odd += g[r * Q + q] * load(p + q * W);
            else
              even += g[r * Q + q] * load(p + q * W);
          }
          if (r + 1 < R) p = in_register(p + x_sample);
        }
        store(sums + int64_t(k) * W, even + odd);
      }
    }
  }
}

typedef void (*Block)(const PixelArgs&, int64_t, int64_t);

template <int R, int Q>
struct RowsOf {
  static constexpr Block value = rows_block<R, Q>;
};
template <int R, int Q>
struct GradOf {
  static constexpr Block value = grad_block<R, Q>;
};

template <template <int, int> class F, int R, int... Q>
static void run_block(const PixelArgs& a, int64_t sample, int64_t p0, int64_t q, std::integer_sequence<int, Q...>) {
  static constexpr Block table[] = {F<R, Q + 1>::value...};
  table[q - 1](a, sample, p0);
}

template <template <int, int> class F, int R>
static void walk_samples(const PixelArgs& a, int64_t sample) {
  constexpr int kMost = kRegisters / R;
  const int64_t vectors = (a.pixels + W - 1) / W, pieces = (vectors + kMost - 1) / kMost;
  for (int64_t piece = 0, v = 0; piece < pieces; ++piece) {
    const int64_t q = (vectors - v + pieces - piece - 1) / (pieces - piece);
    run_block<F, R>(a, sample, v * W, q, std::make_integer_sequence<int, kMost>());
    v += q;
  }
}

template <template <int, int> class F>
static void walk(const PixelArgs& a) {
  const int64_t vectors = (a.pixels + W - 1) / W;
  for (int64_t s = 0; s < a.samples;) {
    const int64_t left = a.samples - s;
    if (left >= 4 && vectors * 4 <= kRegisters) {
      walk_samples<F, 4>(a, s);
      s += 4;
    } else if (left >= 2 && vectors * 2 <= kRegisters) {
      walk_samples<F, 2>(a, s);
      s += 2;
    } else {
      walk_samples<F, 1>(a, s);
      s += 1;
    }
  }
}

static void rows(const PixelArgs& a) { walk<RowsOf>(a); }
static void weight_grad(const PixelArgs& a) { walk<GradOf>(a); }

static void reduce(const float* acc, float* out, int64_t count) {
  int64_t k = 0;
  for (; k + W <= count; k += W) {
    V v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load(acc + (k + i) * W);
    store(out + k, load(out + k) + reduce_rows(v));
  }
  for (; k < count; ++k)
    for (int l = 0; l < W; ++l) out[k] += acc[k * W + l];
}

// every second lane of the two vectors
template <size_t... L>
PST_INLINE V even_lanes(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (2 * int(L))...);
}

// dst[j] = p[step * j] & mask[j] for j in [0, count), and up to W - 1 floats more
template <int Step, class T>
PST_INLINE void copy_columns(const T* p, const T* lo, const T* hi, int64_t step, const uint32_t* mask, float* dst, int64_t count) {
  const auto masked = [&](V v, int64_t j) {
    VI keep;
    __builtin_memcpy(&keep, mask + j, sizeof keep);
    store(dst + j, reinterpret_cast<V>(reinterpret_cast<VI>(v) & keep));
  };
  const auto vectors = [&](const T* q) {
    return Step == 1 ? load(q) : even_lanes(load(q), load(q + W), std::make_index_sequence<W>());
  };
  const int64_t padded = (count + W - 1) / W * W;
  if (Step && p >= lo && p + Step * padded <= hi) {
    for (int64_t j = 0; j < count; j += W) masked(vectors(p + Step * j), j);
    return;
  }
  for (int64_t j = 0; j < count; j += W) {
    const T* q = p + step * j;
    if (Step && q >= lo && q + Step * W <= hi) {
      masked(vectors(q), j);
      continue;
    }
    float lanes[W] = {};
    for (int l = 0; l < W; ++l)
      if (mask[j + l]) {
        const V one = load_first(q + step * l, 1);
        lanes[l] = one[0];
      }
    store(dst + j, load(lanes));
  }
}

PST_INLINE float* clear(float* at, int64_t count) {
  for (int64_t j = 0; j < count; j += W) {
    // a few vectors: GCC would call memset
    asm("" : "+r"(at));
    store(at + j, V{});
  }
  return at + count;
}

template <int Step, class T>
static void pack_of(const PackArgs& a) {
  const T *const lo = static_cast<const T*>(a.lo), *const hi = static_cast<const T*>(a.hi);
  for (int64_t c = 0; c < a.channels; ++c) {
    const T* const plane = static_cast<const T*>(a.src) + c * a.src_channel;
    float* const to = a.dst + c * a.channel_floats;
    for (int64_t t = 0; t < a.column_count; ++t) {
      if (!a.used[c * a.column_count + t]) continue;
      const PackColumn& column = a.columns[t];
      float* at = to + column.plane;
      const bool clean = a.clean && !(column.flat && a.rows[0].count * column.width % W);
      // every copy and clear may run over its end, and what follows then overwrites that; what is left of a vector behind
      // the image's rows is zeros again, unless a flat copy ends within one
      for (int64_t f = 0; f < a.row_count; ++f) {
        const PackRows& rows = a.rows[f];
        at = clean ? at + rows.before * column.width : clear(at, rows.before * column.width);
        const T* from = plane + rows.first * a.src_row + column.start;
        if (column.flat) {
          copy_columns<Step>(from, lo, hi, a.col_stride, column.mask, at, rows.count * column.width);
          at += rows.count * column.width;
        } else {
          for (int64_t r = 0; r < rows.count; ++r, at += column.width, from += a.row_stride * a.src_row)
            copy_columns<Step>(from, lo, hi, a.col_stride, column.mask, at, column.width);
        }
        at = clean ? at + rows.after * column.width : clear(at, rows.after * column.width);
      }
      if (!clean) clear(at, to + column.end - at);
    }
  }
}

template <class T>
static void pack_steps(const PackArgs& a) {
  if (a.col_stride == 1)
    pack_of<1, T>(a);
  else if (a.col_stride == 2)
    pack_of<2, T>(a);
  else
    pack_of<0, T>(a);
}

static void pack(const PackArgs& a) { a.half ? pack_steps<bf16>(a) : pack_steps<float>(a); }

static void spread(const float* src, void* dst, bool half, int64_t step, int64_t count) {
  if (step == 1) {
    int64_t j = 0;
    for (; j + W <= count; j += W) half ? store(static_cast<bf16*>(dst) + j, load(src + j)) : store(static_cast<float*>(dst) + j, load(src + j));
    if (j < count) half ? store_first(static_cast<bf16*>(dst) + j, load_first(src + j, count - j), count - j) : store_first(static_cast<float*>(dst) + j, load_first(src + j, count - j), count - j);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    if (half)
      store_first(static_cast<bf16*>(dst) + step * j, splat(src[j]), 1);
    else
      static_cast<float*>(dst)[step * j] = src[j];
  }
}

template <size_t... L>
PST_INLINE V woven(V a, V b, int, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (int(L) / 2 + (int(L) % 2) * W)...);
}
template <size_t... L>
PST_INLINE V woven_high(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (W / 2 + int(L) / 2 + (int(L) % 2) * W)...);
}

template <class T>
static void interleave_of(const float* even, const float* odd, T* dst, int64_t count) {
  using Lanes = std::make_index_sequence<W>;
  for (int64_t j = 0; j < count; j += W) {
    const int64_t n = count - j < W ? count - j : W;
    const V a = n == W ? load(even + j) : load_first(even + j, n), b = n == W ? load(odd + j) : load_first(odd + j, n);
    const V low = woven(a, b, 0, Lanes()), high = woven_high(a, b, Lanes());
    if (n == W) {
      store(dst + 2 * j, low);
      store(dst + 2 * j + W, high);
    } else {
      store_first(dst + 2 * j, low, 2 * n < W ? 2 * n : W);
      if (2 * n > W) store_first(dst + 2 * j + W, high, 2 * n - W);
    }
  }
}

static void interleave(const float* even, const float* odd, void* dst, bool half, int64_t count) {
  if (half)
    interleave_of(even, odd, static_cast<bf16*>(dst), count);
  else
    interleave_of(even, odd, static_cast<float*>(dst), count);
}

static const PixelKernels kKernels = {W, kRegisters, rows, weight_grad, reduce, pack, spread, interleave};
