// What needs instructions of the GPU by name; the tests replace this file to run the kernels on a CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pst::cuda {

// the dynamic shared memory of the block
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char pst_shared_memory[];
  return pst_shared_memory;
}

__device__ __forceinline__ uint32_t shared_memory_bytes() {
  uint32_t bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

// 16 bytes from global to shared memory, past L1; complete after copies_wait
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The compiler must not compute the value again: of values widened from 16 bits it would keep the 16 bits, and widen them
// for each use.
__device__ __forceinline__ void keep(float& value) { asm volatile("" : "+f"(value)); }

}  // namespace pst::cuda
