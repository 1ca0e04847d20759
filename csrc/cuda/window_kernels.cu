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
            load_turned(a, ring + (from ^ (m * 32)) + t * ROW_BYTES);
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

// A block has a cell and a split of the batch, then the next: columns of x on M, rows of the gradient on N, samples inside
template <class T>
__global__ void __launch_bounds__(ROWS, 1)
    sample_windows_kernel(const int32_t* schedule, const uint4* x, const uint4* dy, int64_t tiles, int splits,
                          float* partial) {
  constexpr int STEPS = ROW_BYTES / 32, COPIES = WINDOW * CHUNKS / WARP;
  constexpr bool IS_BF16 = std::is_same_v<T, bf16>;
  const Header& h = *reinterpret_cast<const Header*>(schedule);
  const int width = h.width, rows = h.rows, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  char* const gradients = shared_memory() + warp * WINDOW * ROW_BYTES;
  char* const features = shared_memory() + CELL_ROWS * ROW_BYTES;  // two buffers
  const int buffer = (int(shared_memory_bytes()) - CELL_ROWS * ROW_BYTES) / (2 * ROW_BYTES) / CHUNKS * CHUNKS * ROW_BYTES;

  for (int item = blockIdx.x; item < h.gradient_cells * splits; item += gridDim.x) {
    const int cell = item % h.gradient_cells, split = item / h.gradient_cells;
    const int t0 = int(tiles * split / splits), t1 = int(tiles * (split + 1) / splits);
    const int from = schedule[h.gradient_place + cell], n = (schedule[h.gradient_place + cell + 1] - from) * CHUNKS;
    const int32_t* const columns = schedule + h.gradient_column + from;
    if (n * 16 > buffer) __trap();  // of another kind of GPU
    const int first = schedule[h.gradient_first + cell * WARPS + warp];
    const int groups = schedule[h.gradient_first + cell * WARPS + warp + 1] - first;

    // eight threads bring a row; chunk c of row or column i is at c ^ i % 8 of its place
    const int32_t* const row = schedule + h.gradient_row + (cell * WARPS + warp) * WINDOW + lane / CHUNKS;
    auto fetch = [&](int t) {
      char* const to = features + (t & 1) * buffer;
#pragma unroll 1  // more would spill
      for (int i = threadIdx.x; i < n; i += ROWS) {
        const int place = i / CHUNKS, c = i % CHUNKS, column = columns[place];
        if (column >= 0)
          copy_async(to + place * ROW_BYTES + (c ^ (place & (CHUNKS - 1))) * 16, x + (int64_t(t) * width + column) * CHUNKS + c);
      }
#pragma unroll
      for (int i = 0; i < COPIES; ++i) {
        const int local = i * (WARP / CHUNKS) + lane / CHUNKS, c = lane % CHUNKS, r = row[i * (WARP / CHUNKS)];
        if (r >= 0)
          copy_async(gradients + local * ROW_BYTES + (c ^ (local & (CHUNKS - 1))) * 16,
                     dy + (int64_t(t) * rows + r) * CHUNKS + c);
      }
    };
    // lanes 0 to 15 give a group's columns at samples 0 to 7 of a step, the others at samples 8 to 15; chunks, two a register
    uint32_t at[MOST_CELL_GROUPS / 2];
#pragma unroll
    for (int i = 0; i < MOST_CELL_GROUPS; ++i) {
      const uint16_t* slot = reinterpret_cast<const uint16_t*>(schedule + h.gradient_slot);
      const uint32_t place = i < groups ? slot[int64_t(first + i) * GROUP_COLUMNS + lane % 16] : 0;
      const uint32_t chunk = place * CHUNKS + (lane / 16 ^ (place & (CHUNKS - 1)));
      at[i / 2] = i % 2 ? at[i / 2] | chunk << 16 : chunk;
    }
    float sum[MOST_CELL_GROUPS][2][4] = {};
    __syncthreads();  // nobody works on the item before any more
    if (t0 < t1) fetch(t0);
    for (int t = t0; t < t1; ++t) {
      copies_wait();
      __syncthreads();  // tile t is there, and nobody works on t - 1 any more
      uint32_t g[2][STEPS / 2][4];  // of eight rows two steps
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int s = 0; s < STEPS / 2; ++s)
          load_matrices(g[b][s], gradients + (b * 8 + lane % 8) * ROW_BYTES + ((s * 4 + lane / 8) ^ lane % 8) * 16);
      __syncwarp();
      if (t + 1 < t1) fetch(t + 1);
      const char* const tile = features + (t & 1) * buffer;
#pragma unroll
      for (int i = 0; i < MOST_CELL_GROUPS; ++i)
        if (i < groups)
#pragma unroll
          for (int s = 0; s < STEPS; ++s) {
            uint32_t a[4];
            load_matrices(a, tile + (((i % 2 ? at[i / 2] >> 16 : at[i / 2] & 0xffff) ^ (s * 2)) * 16));
#pragma unroll
            for (int b = 0; b < 2; ++b)
              multiply_matrices<IS_BF16>(sum[i][b], a, g[b][s / 2][s % 2 * 2], g[b][s / 2][s % 2 * 2 + 1]);
          }
    }
#pragma unroll
    for (int i = 0; i < MOST_CELL_GROUPS; ++i)
      if (i < groups) {
        const uint32_t mine = reinterpret_cast<const uint16_t*>(schedule + h.gradient_lane)[int64_t(first + i) * WARP + lane];
        float* out = partial + int64_t(split) * h.nnz + schedule[h.gradient_base + first + i] + (mine >> 8);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (mine >> j & 1) *out++ = sum[i][j / 4][j % 4];
      }
  }
}

__global__ void __launch_bounds__(PLACE_THREADS)
    sum_window_splits_kernel(const int32_t* schedule, const float* partial, int64_t nnz, int splits, float* grad) {
  const int32_t* source = schedule + reinterpret_cast<const Header*>(schedule)->gradient_source;
  for (int64_t i = int64_t(blockIdx.x) * PLACE_THREADS + threadIdx.x; i < nnz; i += int64_t(gridDim.x) * PLACE_THREADS) {
    float sum = 0;
    for (int s = 0; s < splits; ++s) sum += partial[s * nnz + i];
    grad[source[i]] = sum;
  }
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

cudaError_t sample_windows(Scalar type, Budget budget, const int32_t* schedule, const void* x, const void* dy, int64_t tiles,
                           int64_t nnz, int splits, int blocks, float* partial, float* grad, cudaStream_t stream) {
  const cudaError_t error = of_half(type, [&](auto t) {
    return launch(sample_windows_kernel<decltype(t)>, dim3(unsigned(blocks)), ROWS, budget.bytes, stream, schedule,
                  static_cast<const uint4*>(x), static_cast<const uint4*>(dy), tiles, splits, partial);
  });
  if (error != cudaSuccess) return error;
  return launch(sum_window_splits_kernel, dim3(std::min(ceil_div(nnz, PLACE_THREADS), unsigned(PLACE_BLOCKS))), PLACE_THREADS,
                0, stream, schedule, partial, nnz, splits, grad);
}

}  // namespace pst::cuda
