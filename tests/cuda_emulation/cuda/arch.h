// Stands in for csrc/cuda/arch.h
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pst::cuda {

inline char* shared_memory() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(emulation::block.shared.data()) + 127) / 128 * 128);
}
inline uint32_t shared_memory_bytes() { return uint32_t(emulation::block.shared.size()) - 128; }
inline void copy_async(void* shared, const void* global) { std::memcpy(shared, global, 16); }
inline void copies_wait() {}
inline void keep(float&) {}

// By the instructions' own tables: lane i shows row i of the four matrices, and gets of each elements [i / 4][c] or, turned,
// [c][i / 4] for c = i % 4 * 2 and the next
template <bool TURNED>
void load_some(uint32_t (&a)[4], const void* shared) {
  emulation::Block& b = emulation::block;
  const int warp = b.current / emulation::WARP * emulation::WARP, lane = b.current % emulation::WARP;
  b.exchange[b.current].address = shared;
  b.warp_barrier();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t both[2];
    for (int i = 0; i < 2; ++i) {
      const int c = lane % 4 * 2 + i, r = lane / 4;
      const void* row = b.exchange[warp + matrix * 8 + (TURNED ? c : r)].address;
      if (reinterpret_cast<uintptr_t>(row) % 16) __trap();
      std::memcpy(&both[i], static_cast<const char*>(row) + (TURNED ? r : c) * 2, 2);
    }
    a[matrix] = both[0] | uint32_t(both[1]) << 16;
  }
  b.warp_barrier();
}

inline void load_matrices(uint32_t (&a)[4], const void* shared) { load_some<false>(a, shared); }
inline void load_turned(uint32_t (&a)[4], const void* shared) { load_some<true>(a, shared); }

// a: word 0 is rows 0 to 7 and columns 0 to 7, word 1 the rows below, words 2 and 3 columns 8 to 15; b: two words of rows 0
// to 7 and 8 to 15
template <bool IS_BF16>
void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Block& b = emulation::block;
  const int warp = b.current / emulation::WARP * emulation::WARP, lane = b.current % emulation::WARP;
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 12; ++i) {
    const uint16_t bits = uint16_t(words[i / 2] >> i % 2 * 16);
    b.exchange[b.current].values[i] =
        IS_BF16 ? __bfloat162float(std::bit_cast<__nv_bfloat16>(bits)) : __half2float(std::bit_cast<__half>(bits));
  }
  b.warp_barrier();
  for (int j = 0; j < 4; ++j) {
    const int m = lane / 4 + j / 2 * 8, n = lane % 4 * 2 + j % 2;
    float dot = 0;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      dot += b.exchange[warp + m % 8 * 4 + quad].values[(m / 8 + k / 8 * 2) * 2 + k % 2] *
             b.exchange[warp + n * 4 + quad].values[8 + k / 8 * 2 + k % 2];
    }
    sum[j] += dot;
  }
  b.warp_barrier();
}

}  // namespace pst::cuda
