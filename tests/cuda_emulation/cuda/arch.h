// Stands in for csrc/cuda/arch.h
#pragma once
#include <cuda_runtime.h>

namespace pst::cuda {

inline char* shared_memory() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(emulation::block.shared.data()) + 127) / 128 * 128);
}
inline uint32_t shared_memory_bytes() { return uint32_t(emulation::block.shared.size()) - 128; }
inline void copy_async(void* shared, const void* global) { std::memcpy(shared, global, 16); }
inline void copies_wait() {}
inline void keep(float&) {}

}  // namespace pst::cuda
