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

// Four 8x8 matrices of 16-bit values: lane i gives where row i % 8 of matrix i / 8 is, and has of each matrix the values in
// row i / 4, columns i % 4 * 2 and the next
__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], const void* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from));
}

// the same of the matrices turned: lane i gives column i % 8
__device__ __forceinline__ void load_turned(uint32_t (&a)[4], const void* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from));
}

// sum [16][8] += a [16][16] b [16][8]; lane i has sum[i / 4 + 8 * (j / 2)][i % 4 * 2 + j % 2]
template <bool IS_BF16>
__device__ __forceinline__ void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (IS_BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The compiler must not compute the value again: of values widened from 16 bits it would keep the 16 bits, and widen them
// for each use.
__device__ __forceinline__ void keep(float& value) { asm volatile("" : "+f"(value)); }

}  // namespace pst::cuda
