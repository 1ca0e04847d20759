// linear_schedule.h says how the kernels share out the work
#include "cuda/masked_linear_kernels.h"

#include <algorithm>

#include "cuda/arch.h"
#include "cuda/launch.h"
#include "cuda/scalars.h"
#include "cuda/store_rows.h"

namespace pst::cuda {
namespace {

constexpr int PACK_THREADS = 256;
constexpr int PACK_FEATURES = 64;

template <class T>
__global__ void __launch_bounds__(PACK_THREADS)
    pack_kernel(const T* x, const T* gate, int64_t samples, int64_t features, uint4* tiles, float* sums, bool vectors) {
  constexpr int V = LANES<T>, PITCH = PACK_FEATURES + 1, READS = PACK_FEATURES / V;
  __shared__ T tile[TOKENS<T> * PITCH];
  const int64_t first = int64_t(blockIdx.y) * TOKENS<T>, f0 = int64_t(blockIdx.x) * PACK_FEATURES;
  if (vectors) {
    for (int i = threadIdx.x; i < TOKENS<T> * READS; i += PACK_THREADS) {
      const int t = i / READS, f = i % READS * V;
      float v[V] = {};
      if (first + t < samples && f0 + f < features) {
        const int64_t at = (first + t) * features + f0 + f;
        unpack<T>(*reinterpret_cast<const uint4*>(x + at), v);
        if (gate) {
          float g[V];
          unpack<T>(*reinterpret_cast<const uint4*>(gate + at), g);
#pragma unroll
          for (int k = 0; k < V; ++k) v[k] = g[k] <= 0 ? 0 : v[k];
        }
      }
#pragma unroll
      for (int k = 0; k < V; ++k) tile[t * PITCH + f + k] = from_float<T>(v[k]);
    }
  } else {
    for (int i = threadIdx.x; i < TOKENS<T> * PACK_FEATURES; i += PACK_THREADS) {
      const int t = i / PACK_FEATURES, f = i % PACK_FEATURES;
      float v = 0;
      if (first + t < samples && f0 + f < features) {
        const int64_t at = (first + t) * features + f0 + f;
        v = gate && to_float(gate[at]) <= 0 ? 0 : to_float(x[at]);
      }
      tile[t * PITCH + f] = from_float<T>(v);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < PACK_FEATURES * CHUNKS; i += PACK_THREADS) {
    const int f = i / CHUNKS, c = i % CHUNKS;
    float v[V], sum = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      v[k] = to_float(tile[(c * V + k) * PITCH + f]);
      sum += v[k];
    }
    if (f0 + f < features) tiles[(blockIdx.y * features + f0 + f) * CHUNKS + c] = pack<T>(v);
    if (sums) {
#pragma unroll
      for (int step = 1; step < CHUNKS; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (c == 0 && f0 + f < features) sums[blockIdx.y * features + f0 + f] = sum;
    }
  }
}

constexpr int FLAT_THREADS = 256;

__global__ void __launch_bounds__(FLAT_THREADS)
    gather_kernel(const int32_t* schedule, const float* values, uint2* entries) {
  const Header& h = *reinterpret_cast<const Header*>(schedule);
  const int32_t* source = schedule + h.source;
  const uint16_t* slot = reinterpret_cast<const uint16_t*>(schedule + h.slot);
  const int64_t count = int64_t(h.groups) * WARP;
  for (int64_t e = int64_t(blockIdx.x) * FLAT_THREADS + threadIdx.x; e < count; e += int64_t(gridDim.x) * FLAT_THREADS)
    entries[e] = make_uint2(slot[e] * ROW_BYTES + e % CHUNKS * 16, source[e] < 0 ? 0 : __float_as_uint(values[source[e]]));
}

// the chunk of a thread's row that it takes i-th
__device__ __forceinline__ int turn(int i) { return i ^ (threadIdx.x & (CHUNKS - 1)); }

// A block has a chunk of rows and a tile of samples.
// The 512 rows of sums leave through shared memory, so that a warp writes neighbours.
template <class T>
__global__ void __launch_bounds__(ROWS, 1)
    multiply_kernel(const int32_t* schedule, const uint2* entries, const uint4* x, const float* bias, T* y, int64_t samples,
             bool relu) {
  constexpr int V = LANES<T>;
  const Header& h = *reinterpret_cast<const Header*>(schedule);
  const int columns = h.columns, stages = h.stages, width = h.width, rows = h.rows;
  if (Budget::ring_bytes(columns) > int(shared_memory_bytes())) __trap();  // of another kind of GPU
  char* const ring = shared_memory();
  const int chunk = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int32_t* first = schedule + h.first + (int64_t(chunk) * WARPS + warp) * stages;
  const int row = schedule[h.row + chunk * ROWS + threadIdx.x];
  x += blockIdx.y * int64_t(width) * CHUNKS;

  if (threadIdx.x < CHUNKS) reinterpret_cast<uint4*>(ring + RING * columns * ROW_BYTES)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  auto fetch = [&](int s) {
    const int from = s * columns, n = min(columns, width - from) * CHUNKS;
    char* const to = ring + s % RING * columns * ROW_BYTES;
    for (int i = threadIdx.x; i < n; i += ROWS) copy_async(to + i * 16, x + int64_t(from) * CHUNKS + i);
  };
  if (stages) fetch(0);

  float sum[CHUNKS][V];
  const float start = bias && row >= 0 ? bias[row] : 0;
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
    for (int k = 0; k < V; ++k) sum[i][k] = start;

  const uint2* at = entries + lane;
  uint2 next = make_uint2(0, 0);
  if (stages) {
    at += int64_t(first[0]) * WARP;
    next = *at;  // one entry ahead of its use, and one above the last
  }
  for (int s = 0; s < stages; ++s) {
    copies_wait();
    __syncthreads();  // stage s is there, and nobody works on s - 1 any more
    if (s + 1 < stages) fetch(s + 1);
    for (int n = first[s + 1] - first[s]; n > 0; --n) {
      const uint2 entry = next;
      at += WARP;
      next = *at;
      const float weight = __uint_as_float(entry.y);
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        float v[V];
        unpack<T>(*reinterpret_cast<const uint4*>(ring + (entry.x ^ (i * 16))), v);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[i][k] = fmaf(weight, v[k], sum[i][k]);
      }
    }
  }

  __syncthreads();
  const int local = row - chunk * ROWS;
  if (row >= 0)
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (relu)
#pragma unroll
        for (int k = 0; k < V; ++k) sum[i][k] = sum[i][k] < 0 ? 0 : sum[i][k];
      reinterpret_cast<uint4*>(ring)[stored_at<T>(local, turn(i))] = pack<T>(sum[i]);
    }
  __syncthreads();
  store_rows<T>(reinterpret_cast<const uint4*>(ring), chunk * ROWS, ROWS, y, rows, samples, int64_t(blockIdx.y) * TOKENS<T>);
}

// A block has a cell and a split of the batch, then the next
template <class T>
__global__ void __launch_bounds__(ROWS, 1)
    sample_kernel(const int32_t* schedule, const uint4* x, const uint4* dy, int64_t tiles, int splits, float* partial) {
  constexpr int V = LANES<T>;
  const Header& h = *reinterpret_cast<const Header*>(schedule);
  const int columns = h.cell_columns, width = h.width, rows = h.rows;
  const int64_t entries = int64_t(h.cell_groups) * WARP;
  const uint16_t* slot = reinterpret_cast<const uint16_t*>(schedule + h.cell_slot);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  char* const memory = shared_memory();
  char* const gradients = memory + warp * WARP * ROW_BYTES;
  char* const features = memory + ROWS * ROW_BYTES;  // two buffers
  float* const sums = reinterpret_cast<float*>(features + 2 * columns * ROW_BYTES);
  const int lowest = lane % CHUNKS * 16;

  for (int item = blockIdx.x; item < h.cells * splits; item += gridDim.x) {
    const int cell = item % h.cells, split = item / h.cells;
    const int64_t t0 = tiles * split / splits, t1 = tiles * (split + 1) / splits;
    const int from = schedule[h.cell_from + cell], n = min(columns, width - from) * CHUNKS;
    const int32_t* first = schedule + h.cell_first + cell * WARPS;
    const int begin = (first[warp] - first[0]) * WARP + lane, end = (first[warp + 1] - first[0]) * WARP;
    const int64_t base = int64_t(first[0]) * WARP;
    if (first[WARPS] - first[0] > (int(shared_memory_bytes()) - ROWS * ROW_BYTES - 2 * columns * ROW_BYTES) / WARP / 4)
      __trap();  // of another kind of GPU

    // eight threads bring a row: four rows of the warp at a time
    int32_t row[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
      row[i] = schedule[h.cell_row + cell * ROWS + warp * WARP + i * (WARP / CHUNKS) + lane / CHUNKS];
    auto fetch_features = [&](int64_t t) {
      char* const to = features + (t & 1) * columns * ROW_BYTES;
      for (int i = threadIdx.x; i < n; i += ROWS) copy_async(to + i * 16, x + (t * width + from) * CHUNKS + i);
    };
    auto fetch_gradients = [&](int64_t t) {
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i)
        if (row[i] >= 0)
          copy_async(gradients + (i * WARP + lane) * 16, dy + (t * rows + row[i]) * CHUNKS + lane % CHUNKS);
    };
    __syncthreads();  // nobody works on the item before any more
    for (int e = begin; e < end; e += WARP) sums[e] = 0;
    if (t0 < t1) {
      fetch_features(t0);
      fetch_gradients(t0);
    }
    for (int64_t t = t0; t < t1; ++t) {
      copies_wait();
      __syncthreads();  // tile t is there, and nobody works on t - 1 any more
      float g[CHUNKS][V];
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        unpack<T>(*reinterpret_cast<const uint4*>(gradients + lane * ROW_BYTES + (lowest ^ (i * 16))), g[i]);
#pragma unroll
        for (int k = 0; k < V; ++k) keep(g[i][k]);
      }
      __syncwarp();
      if (t + 1 < t1) {
        fetch_features(t + 1);
        fetch_gradients(t + 1);
      }
      const char* const tile = features + (t & 1) * columns * ROW_BYTES;
      int next = begin < end ? slot[base + begin] : 0;
      for (int e = begin; e < end; e += WARP) {
        const int at = next * ROW_BYTES + lowest;
        next = e + WARP < end ? slot[base + e + WARP] : 0;
        float dot[4] = {sums[e], 0, 0, 0};
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
          float v[V];
          unpack<T>(*reinterpret_cast<const uint4*>(tile + (at ^ (i * 16))), v);
#pragma unroll
          for (int k = 0; k < V; ++k) dot[k & 3] = fmaf(v[k], g[i][k], dot[k & 3]);
        }
        sums[e] = (dot[0] + dot[1]) + (dot[2] + dot[3]);
      }
    }
    for (int e = begin; e < end; e += WARP) partial[split * entries + base + e] = sums[e];
  }
}

__global__ void __launch_bounds__(FLAT_THREADS)
    sum_splits_kernel(const int32_t* schedule, const float* partial, int splits, float* grad) {
  const Header& h = *reinterpret_cast<const Header*>(schedule);
  const int32_t* source = schedule + h.cell_source;
  const int64_t count = int64_t(h.cell_groups) * WARP;
  for (int64_t e = int64_t(blockIdx.x) * FLAT_THREADS + threadIdx.x; e < count; e += int64_t(gridDim.x) * FLAT_THREADS) {
    if (source[e] < 0) continue;
    float sum = 0;
    for (int s = 0; s < splits; ++s) sum += partial[s * count + e];
    grad[source[e]] = sum;
  }
}

// A warp has 32 features, a block's warps every eighth tile
__global__ void __launch_bounds__(FLAT_THREADS) sum_tiles_kernel(const float* sums, int64_t tiles, int64_t features, float* out) {
  constexpr int PARTS = FLAT_THREADS / WARP;
  __shared__ float part[PARTS][WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t f = int64_t(blockIdx.x) * WARP + lane;
  float sum = 0;
  if (f < features)
    for (int64_t t = warp; t < tiles; t += PARTS) sum += sums[t * features + f];
  part[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && f < features) {
    for (int p = 1; p < PARTS; ++p) sum += part[p][lane];
    out[f] = sum;
  }
}

// a loop over `most` things takes the rest
dim3 flat(int64_t most) { return dim3(unsigned(std::clamp<int64_t>(most / FLAT_THREADS, 1, 2048))); }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

cudaError_t pack_tiles(Scalar type, const void* x, const void* gate, int64_t samples, int64_t features, void* tiles,
                       float* sums, cudaStream_t stream) {
  return of_type(type, [&](auto t) {
    using T = decltype(t);
    return launch(pack_kernel<T>, dim3(ceil_div(features, PACK_FEATURES), ceil_div(samples, TOKENS<T>)), PACK_THREADS, 0,
                  stream, static_cast<const T*>(x), static_cast<const T*>(gate), samples, features,
                  static_cast<uint4*>(tiles), sums, features % LANES<T> == 0 && aligned(x) && aligned(gate));
  });
}

cudaError_t sum_tiles(const float* sums, int64_t tiles, int64_t features, float* out, cudaStream_t stream) {
  return launch(sum_tiles_kernel, dim3(ceil_div(features, WARP)), FLAT_THREADS, 0, stream, sums, tiles, features, out);
}

cudaError_t gather_entries(const int32_t* schedule, const float* values, int64_t most, Entry* entries,
                           cudaStream_t stream) {
  return launch(gather_kernel, flat(most), FLAT_THREADS, 0, stream, schedule, values, reinterpret_cast<uint2*>(entries));
}

cudaError_t multiply(Scalar type, Budget budget, const int32_t* schedule, const Entry* entries, const void* x,
                     const float* bias, void* y, int64_t samples, int64_t rows, bool relu, cudaStream_t stream) {
  const int shared = std::max(Budget::ring_bytes(budget.columns()), ROWS * ROW_BYTES);
  return of_type(type, [&](auto t) {
    using T = decltype(t);
    return launch(multiply_kernel<T>, dim3(unsigned(chunks_of(rows)), ceil_div(samples, TOKENS<T>)), ROWS, shared, stream,
                  schedule, reinterpret_cast<const uint2*>(entries), static_cast<const uint4*>(x), bias,
                  static_cast<T*>(y), samples, relu);
  });
}

cudaError_t sample(Scalar type, Budget budget, const int32_t* schedule, const void* x, const void* dy, int64_t tiles,
                   int splits, int blocks, float* partial, cudaStream_t stream) {
  return of_type(type, [&](auto t) {
    return launch(sample_kernel<decltype(t)>, dim3(unsigned(blocks)), ROWS, budget.bytes, stream, schedule,
                  static_cast<const uint4*>(x), static_cast<const uint4*>(dy), tiles, splits, partial);
  });
}

cudaError_t sum_splits(const int32_t* schedule, const float* partial, int64_t most, int splits, float* grad,
                       cudaStream_t stream) {
  return launch(sum_splits_kernel, flat(most), FLAT_THREADS, 0, stream, schedule, partial, splits, grad);
}

}  // namespace pst::cuda
