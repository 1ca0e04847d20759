// The part of CUDA's runtime that csrc/cuda uses, on a CPU: blocks run one after the other, a block's threads as fibers that
// change at barriers, so that the kernels' own code runs and is compared with a reference where there is no GPU.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
[[noreturn]] inline void __trap() {
  std::fputs("a kernel trapped\n", stderr);
  std::abort();
}

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 64 * 1024;

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::vector<char> stack = std::vector<char>(STACK);
  bool begun = false, done = false;
};

struct Block;

// Threads that wait for each other; one that ends waits for nobody
struct Barrier {
  int threads = 0, waiting = 0;
  unsigned passed = 0;

  void wait(Block& block);
  void end() {
    --threads;
    pass();
  }
  void pass() {
    if (waiting < threads) return;
    waiting = 0;
    ++passed;
  }
};

// one block at a time
struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  struct Shown {
    float values[12];
    const void* address;
  };
  std::vector<Shown> exchange;  // what a warp's threads show each other
  std::function<void()> body;
  ucontext_t main;
  jmp_buf scheduler;
  int current = 0;
  dim3 thread, block, grid, threads;
  Barrier everyone;
  std::vector<Barrier> warps;

  void leave() {
    if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
  }
  void barrier() { everyone.wait(*this); }
  void warp_barrier() { warps[current / WARP].wait(*this); }
  void run();
};

inline void Barrier::wait(Block& block) {
  const unsigned turn = passed;
  ++waiting;
  pass();
  while (passed == turn) block.leave();
}

inline Block block;

inline void enter() {
  block.body();
  block.fibers[block.current].done = true;
  block.everyone.end();
  block.warps[block.current / WARP].end();
  _longjmp(block.scheduler, 1);
}

inline void Block::run() {
  for (Fiber& f : fibers) f.begun = f.done = false;
  everyone = {int(threads.x)};
  warps.assign((threads.x + WARP - 1) / WARP, {});
  for (unsigned i = 0; i < threads.x; ++i) ++warps[i / WARP].threads;
  static volatile bool left;
  for (left = true; left;) {
    left = false;
    for (current = 0; current < int(threads.x); ++current) {
      Fiber& f = fibers[current];
      if (f.done) continue;
      left = true;
      thread.x = unsigned(current);
      if (_setjmp(scheduler)) continue;
      if (f.begun) _longjmp(f.here, 1);
      f.begun = true;
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.data();
      f.start.uc_stack.ss_size = STACK;
      f.start.uc_link = &main;
      makecontext(&f.start, enter, 0);
      setcontext(&f.start);
    }
  }
}

}  // namespace emulation

inline const dim3 &threadIdx = emulation::block.thread, &blockIdx = emulation::block.block, &gridDim = emulation::block.grid;

inline void __syncthreads() { emulation::block.barrier(); }
inline void __syncwarp() { emulation::block.warp_barrier(); }
inline float __shfl_xor_sync(uint32_t, float value, int step) {
  emulation::Block& b = emulation::block;
  const int me = b.current;
  b.exchange[me].values[0] = value;
  b.warp_barrier();
  const float other = b.exchange[me ^ step].values[0];
  b.warp_barrier();
  return other;
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// a small GPU, so that small matrices take several stages and blocks several items
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 3 : 99 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Parameters... arguments) {
  emulation::Block& b = emulation::block;
  b.grid = config->gridDim;
  b.threads = config->blockDim;
  if (b.fibers.size() < b.threads.x) b.fibers.resize(b.threads.x);
  b.exchange.resize(b.fibers.size());
  b.body = [&] { kernel(arguments...); };
  for (b.block.z = 0; b.block.z < b.grid.z; ++b.block.z)
    for (b.block.y = 0; b.block.y < b.grid.y; ++b.block.y)
      for (b.block.x = 0; b.block.x < b.grid.x; ++b.block.x) {
        b.shared.assign(config->dynamicSmemBytes + 128, char(0xff));  // NaN in every format
        b.run();
      }
  return cudaSuccess;
}
