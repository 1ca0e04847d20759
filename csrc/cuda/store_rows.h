// Rows of results, sorted by length in a block, leave through shared memory, so that a warp writes neighbours
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/linear_schedule.h"
#include "cuda/scalars.h"

namespace pst::cuda {

template <class T>
constexpr int TOKENS = ROW_BYTES / int(sizeof(T));

template <class T>
constexpr int PAIR = 4 / int(sizeof(T));  // rows that a thread writes together

// where a row's chunk of samples lies
template <class T>
__device__ __forceinline__ int stored_at(int row, int chunk) {
  return row * CHUNKS + (chunk ^ (row / PAIR<T> & (CHUNKS - 1)));
}

// `count` rows from `first` on of the ROWS threads' block to y [samples, rows], TOKENS samples from t0 on
template <class T>
__device__ __forceinline__ void store_rows(const uint4* stored, int first, int count, T* y, int rows, int64_t samples,
                                           int64_t t0) {
  constexpr int V = LANES<T>, P = PAIR<T>;
  const bool together = P == 2 && rows % 2 == 0;
  for (int i = threadIdx.x; i < count / P * CHUNKS; i += ROWS) {
    const int r = i % (count / P) * P, c = i / (count / P);
    const int64_t to = int64_t(first) + r;
    if (to >= rows) continue;
    float v[P][V];
#pragma unroll
    for (int p = 0; p < P; ++p) unpack<T>(stored[stored_at<T>(r + p, c)], v[p]);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int64_t t = t0 + c * V + k;
      if (t >= samples) break;
      T* const out = y + t * rows + to;
      if (together) {
        const float both[2] = {v[0][k], v[P - 1][k]};
        *reinterpret_cast<uint32_t*>(out) = Words<T>::word(both);
      } else {
#pragma unroll
        for (int p = 0; p < P; ++p)
          if (to + p < rows) out[p] = from_float<T>(v[p][k]);
      }
    }
  }
}

}  // namespace pst::cuda
