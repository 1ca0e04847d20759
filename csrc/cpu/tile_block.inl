// The epilogue of a register block; every *.inl on batch tiles includes it in its own namespace.

#include "cpu/vec.h"

constexpr int kSub = kLanes / PST_W;

// past the caches: a line of a fresh result is otherwise read from memory before it is overwritten
static inline __attribute__((always_inline)) void stream(float* p, V v) {
#if PST_X86 && PST_W == 16
  __builtin_ia32_movntps512(p, v);
#elif PST_X86 && PST_W == 8
  __builtin_ia32_movntps256(p, v);
#else
  store(p, v);
#endif
}
static inline void stream_end() {
#if PST_X86
  __builtin_ia32_sfence();
#endif
}

// Stores R x Q finished pixels of output o; behind the last block of channels it gathers what the epilogue wants of them
template <int R, int Q>
static inline __attribute__((always_inline)) void finish(const RowsArgs& a, int o, int sub, bool first, bool last, float* out,
                                                         V* acc) {
  const int64_t y_pix = a.y_pix, y_row = a.y_row;
  if (last && a.moments) {
    float* m = a.moments + o * 3 * kLanes + sub * PST_W;
    // sums around the first pixel, so that a mean far from zero costs no digits
    const V origin = first ? acc[0] : load(m);
    V sum = first ? V{} : load(m + kLanes), square = first ? V{} : load(m + 2 * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < R * Q; ++i) {
      const V d = acc[i] - origin;
      sum += d;
      square += d * d;
    }
    store(m, origin);
    store(m + kLanes, sum);
    store(m + 2 * kLanes, square);
  }
  if (last && a.gate_y) {
    const int64_t at = out - a.y;
    const V scale = splat(a.gate_scale[o]), shift = splat(a.gate_shift[o]), mean = splat(a.gate_mean[o]);
    float* sums = a.gate_sums + o * 2 * kLanes + sub * PST_W;
    V sum = load(sums), product = load(sums + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) {
        const int64_t pixel = at + r * y_row + q * y_pix;
        const V yv = load(a.gate_y + pixel);
        V v = acc[r * Q + q];
        if (a.relu) {
          const V z = a.gate_z ? load(a.gate_z + pixel) : yv * scale + shift;
          v = z > 0.f ? v : V{};
        }
        sum += v;
        product += v * (yv - mean);
        acc[r * Q + q] = v;
      }
    store(sums, sum);
    store(sums + kLanes, product);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) store(out + r * y_row + q * y_pix, acc[r * Q + q]);
}
