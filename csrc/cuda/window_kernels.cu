// Products by windows of 16 rows on tensor cores (linear_schedule.h)
#include <algorithm>
#include <type_traits>

#include "cuda/arch.h"
#include "cuda/launch.h"
#include "cuda/masked_linear_kernels.h"
#include "cuda/scalars.h"
#include "cuda/store_rows.h"

namespace pst::cuda {
namespace {

constexpr int PLACE_THREADS = 256, PLACE_BLOCKS = 2048;

__global__ void __launch_bounds__(PLACE_THREADS) clear_weights_kernel(const int32_t* schedule, uint4* weights) {
  const int64_t count = int64_t(reinterpret_cast<const Header*>(schedule)->window_groups) * WARP;
  for (int64_t i = int64_t(blockIdx.x) * PLACE_THREADS + threadIdx.x; i < count; i += int64_t(gridDim.x) * PLACE_THREADS)
    weights[i] = make_uint4(0, 0, 0, 0);
}

template <class T>
__global__ void __launch_bounds__(PLACE_THREADS)
    place_weights_kernel(const int32_t* schedule, const float* values, int64_t nnz, T* weights) {
  const int32_t* place = schedule + reinterpret_cast<const Header*>(schedule)->window_place;
  for (int64_t i = int64_t(blockIdx.x) * PLACE_THREADS + threadIdx.x; i < nnz; i += int64_t(gridDim.x) * PLACE_THREADS)
    weights[place[i]] = from_float<T>(values[i]);
}

// A block has a chunk of rows and TILES tiles of samples; sum[window or tile][16 samples][8 rows][of the thread]
template <class T, int TILES>
__global__ void __launch_bounds__(ROWS, 1)
    window_kernel(const int32_t* schedule, const uint4* weights, const uint4* x, const float* bias, T* y, int64_t samples,
                  int tiles, bool relu) {
  constexpr WindowBudget BUDGET{TILES};
  constexpr int WINDOWS = BUDGET.windows(), PLACE = BUDGET.place_bytes(), BLOCKS = ROW_BYTES / 32;
  constexpr bool IS_BF16 = std::is_same_v<T, bf16>;
  const Header& h = *reinterpret_cast<const Header*>(schedule);
  const int columns = h.window_columns, stages = h.window_stages, width = h.width, rows = h.rows;
  if (h.window_tiles != TILES || BUDGET.ring_bytes(columns) > int(shared_memory_bytes())) __trap();  // of another kind of GPU
  char* const ring = shared_memory();
  const int chunk = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int first_tile = blockIdx.y * TILES;
  const int32_t* first = schedule + h.window_first + (int64_t(chunk) * WARPS + warp) * stages * WINDOWS;
  // the thread's rows are 2 (lane % 4) and the next, of each eight
  const int32_t* row = schedule + h.window_row + (chunk * WARPS + warp) * WINDOWS * WINDOW + lane % 4 * 2;
  x += int64_t(first_tile) * width * CHUNKS;

  for (int i = threadIdx.x; i < CHUNKS * PLACE / 16; i += ROWS)
    reinterpret_cast<uint4*>(ring + RING * columns * PLACE)[i] = make_uint4(0, 0, 0, 0);
  auto fetch = [&](int s) {
    const int from = s * columns, n = min(columns, width - from) * CHUNKS;
    char* const to = ring + s % RING * columns * PLACE;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      if (first_tile + t < tiles)  // another's sums are not stored
        for (int i = threadIdx.x; i < n; i += ROWS) {
          const int column = i / CHUNKS, c = i % CHUNKS ^ (column & (CHUNKS - 1));
          copy_async(to + column * PLACE + t * ROW_BYTES + c * 16, x + (int64_t(t) * width + from) * CHUNKS + i);
        }
  };
  if (stages) fetch(0);

  float sum[MOST_TILES][BLOCKS][2][4];
#pragma unroll
  for (int p = 0; p < WINDOWS; ++p)
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int r = row[p * WINDOW + b * 8 + j];
        const float start = bias && r >= 0 ? bias[r] : 0;
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int m = 0; m < BLOCKS; ++m) sum[p + t][m][b][j] = sum[p + t][m][b][j + 2] = start;
      }

  // lanes 0 to 7 and 16 to 23 give columns of samples 0 to 7, the others of samples 8 to 15
  const int column = lane / 16 * 8 + lane % 8, half = lane / 8 & 1;
  const uint16_t* slot = reinterpret_cast<const uint16_t*>(schedule + h.window_slot) + column;
  const uint4* weight = weights + lane;
  int next_slot = 0;
  uint4 next = make_uint4(0, 0, 0, 0);
  if (stages) {
    slot += int64_t(first[0]) * GROUP_COLUMNS;
    weight += int64_t(first[0]) * WARP;
    next_slot = *slot;  // one group ahead of its use, and one above the last
    next = *weight;
  }
  for (int s = 0; s < stages; ++s) {
    copies_wait();
    __syncthreads();  // stage s is there, and nobody works on s - 1 any more
    if (s + 1 < stages) fetch(s + 1);
#pragma unroll
    for (int p = 0; p < WINDOWS; ++p, ++first)
      for (int n = first[1] - first[0]; n > 0; --n) {
        const uint4 w = next;
        const int from = next_slot * PLACE + (half ^ (next_slot & (CHUNKS - 1))) * 16;
        next_slot = *(slot += GROUP_COLUMNS);
        next = *(weight += WARP);
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int m = 0; m < BLOCKS; ++m) {
            uint32_t a[4];
            load_matrices(a, ring + (from ^ (m * 32)) + t * ROW_BYTES);
            multiply_matrices<IS_BF16>(sum[p + t][m][0], a, w.x, w.y);
            multiply_matrices<IS_BF16>(sum[p + t][m][1], a, w.z, w.w);
          }
      }
  }

  __syncthreads();
  T* const stored = reinterpret_cast<T*>(ring);
#pragma unroll
  for (int p = 0; p < WINDOWS; ++p)
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int r = row[p * WINDOW + b * 8 + j], local = r - chunk * BUDGET.rows();
        if (r < 0) continue;
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float v = sum[p + t][m][b][i * 2 + j];
              const int to = t * BUDGET.rows() * CHUNKS + stored_at<T>(local, m * 2 + i);
              stored[to * LANES<T> + lane / 4] = from_float<T>(relu && v < 0 ? 0 : v);
            }
      }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TILES; ++t)
    store_rows<T>(reinterpret_cast<const uint4*>(ring) + t * BUDGET.rows() * CHUNKS, chunk * BUDGET.rows(), BUDGET.rows(), y,
                  rows, samples, int64_t(first_tile + t) * TOKENS<T>);
}

// f(T{}) with the activations' type, of 16 bits
template <class F>
cudaError_t of_half(Scalar type, F f) {
  return type == Scalar::bf16 ? f(bf16{}) : f(half{});
}

}  // namespace

cudaError_t place_weights(Scalar type, const int32_t* schedule, const float* values, int64_t nnz, void* weights,
                          cudaStream_t stream) {
  const cudaError_t error = launch(clear_weights_kernel, dim3(PLACE_BLOCKS), PLACE_THREADS, 0, stream, schedule,
                                   static_cast<uint4*>(weights));
  if (error != cudaSuccess) return error;
  return of_half(type, [&](auto t) {
    using T = decltype(t);
    return launch(place_weights_kernel<T>, dim3(std::min(ceil_div(nnz, PLACE_THREADS), unsigned(PLACE_BLOCKS))),
                  PLACE_THREADS, 0, stream, schedule, values, nnz, static_cast<T*>(weights));
  });
}

cudaError_t multiply_windows(Scalar type, Budget budget, int tiles, const int32_t* schedule, const void* weights,
                             const void* x, const float* bias, void* y, int64_t samples, int64_t rows, bool relu,
                             cudaStream_t stream) {
  const WindowBudget windows{tiles};
  const int shared = std::max(windows.ring_bytes(windows.columns(budget)), ROWS * ROW_BYTES);
  return of_half(type, [&](auto t) {
    using T = decltype(t);
    const int of_samples = int(ceil_div(samples, TOKENS<T>));
    auto* const kernel = tiles == 1 ? window_kernel<T, 1> : window_kernel<T, 2>;
    return launch(kernel, dim3(unsigned(windows.chunks(rows)), ceil_div(of_samples, tiles)), ROWS, shared, stream, schedule,
                  static_cast<const uint4*>(weights), static_cast<const uint4*>(x), bias, static_cast<T*>(y), samples,
                  of_samples, relu);
  });
}

}  // namespace pst::cuda
