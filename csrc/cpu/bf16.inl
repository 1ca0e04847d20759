// Vectors V of floats to and from bfloat16; included behind V, in its namespace.

struct bf16 {
  uint16_t bits;
};
typedef uint32_t VBits __attribute__((vector_size(sizeof(V))));
typedef uint16_t VHalf __attribute__((vector_size(sizeof(V) / 2)));

static inline __attribute__((always_inline)) V load(const bf16* p) {
  VHalf h;
  __builtin_memcpy(&h, p, sizeof h);
  return reinterpret_cast<V>(__builtin_convertvector(h, VBits) << 16);
}

// round to nearest even; a NaN stays a NaN
static inline __attribute__((always_inline)) void store(bf16* p, V v) {
  const VBits bits = reinterpret_cast<VBits>(v);
  const VBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VBits is_nan = reinterpret_cast<VBits>(v != v);
  const VHalf h = __builtin_convertvector((is_nan & ((bits >> 16) | 64)) | (~is_nan & rounded), VHalf);
  __builtin_memcpy(p, &h, sizeof h);
}
