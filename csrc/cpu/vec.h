// Vectors of PST_W floats for one instruction set. No include guard: every *.inl that is compiled once per instruction
// set includes this inside its own namespace, with PST_W set to 16 (AVX-512), 8 (AVX2) or 4 (portable).
// Includes nothing; the including .cpp has <cstdint>, <cstring> and <utility> before the first PST_TARGET_BEGIN.

constexpr int W = PST_W;
typedef float V __attribute__((vector_size(PST_W * 4)));
typedef float VU __attribute__((vector_size(PST_W * 4), aligned(4), may_alias));
typedef uint32_t VI __attribute__((vector_size(PST_W * 4)));

#define PST_INLINE inline __attribute__((always_inline))

PST_INLINE V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
PST_INLINE void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
PST_INLINE V splat(float x) { return x - V{}; }
// one register: GCC would otherwise recompute every address from its parts
PST_INLINE const float* in_register(const float* p) {
  asm("" : "+r"(p));
  return p;
}

#include "cpu/bf16.inl"

// lane l of the result: a[l] where bit S of l is clear, else b[l - S]; and the other halves, a[l + S] and b[l]
template <int S, size_t... L>
PST_INLINE V even_blocks(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? int(L) - S + W : int(L))...);
}
template <int S, size_t... L>
PST_INLINE V odd_blocks(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? int(L) + W : int(L) + S)...);
}
// a[l] where bit S of l is clear, else b[l]; and the lanes that this leaves out, each moved to the same vector's other half
template <int S, size_t... L>
PST_INLINE V keep_blocks(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? int(L) + W : int(L))...);
}
template <int S, size_t... L>
PST_INLINE V swap_blocks(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? int(L) - S + W : int(L) + S)...);
}

template <int S>
PST_INLINE void transpose_step(V* v) {
  using Lanes = std::make_index_sequence<W>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const V a = v[i], b = v[i + S];
    v[i] = even_blocks<S>(a, b, Lanes());
    v[i + S] = odd_blocks<S>(a, b, Lanes());
  }
}

// W x W in place
PST_INLINE void transpose(V* v) {
  if constexpr (W >= 16) transpose_step<8>(v);
  if constexpr (W >= 8) transpose_step<4>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

template <int S>
PST_INLINE void reduce_step(V* v) {
  using Lanes = std::make_index_sequence<W>;
#pragma GCC unroll 16
  for (int i = 0; i < S; ++i)
    v[i] = keep_blocks<S>(v[i], v[i + S], Lanes()) + swap_blocks<S>(v[i], v[i + S], Lanes());
}

// W vectors to one: lane l is the sum of v[l]'s lanes
PST_INLINE V reduce_rows(V* v) {
  if constexpr (W >= 16) reduce_step<8>(v);
  if constexpr (W >= 8) reduce_step<4>(v);
  reduce_step<2>(v);
  reduce_step<1>(v);
  return v[0];
}
