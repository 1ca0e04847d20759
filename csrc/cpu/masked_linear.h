// y = F.linear(x, weight * mask) with the surviving weights packed by rows.
//
// Activations are packed in tiles of TILE samples: tile t holds the samples [t * TILE, ...) as [features][lanes], lanes
// being TILE or, in the last tile, what is left rounded up to 16 (zeros above the batch). So one weight multiplies
// whole vectors of samples, and a tile of `columns` features stays in L1 while all rows use it.
#pragma once
#include <cstdint>

namespace pst {

constexpr int TILE = 64;

// the nonzeros of one row within one column tile
struct Segment {
  int32_t row, start, length;
};

// Built once per mask (build_schedule). Rows are cut into chunks of about equal nonzeros; within a (column tile, chunk)
// segments are sorted by length, longest first: neighbours have equal trip counts, so branches predict and two rows run
// side by side.
struct Schedule {
  int columns = 0;      // features a column tile
  int column_tiles = 0;
  int chunks = 0;
  const int32_t* chunk_row = nullptr;  // [chunks + 1]
  const int32_t* first = nullptr;      // [column_tiles * chunks + 1] into segments
  const int32_t* position = nullptr;   // [column_tiles * chunks + 1] of the products in segment order, each padded to 16
  const Segment* segments = nullptr;

  int cell(int column_tile, int chunk) const { return column_tile * chunks + chunk; }
};

enum class Scalar { f32, bf16 };

struct LinearKernels {
  // row-major [samples, ld] -> a tile's columns [k0, k1); gate: take 0 where gate <= 0 (ReLU backward);
  // column_sums (or null) += sums over the samples
  void (*pack)(Scalar, const void* src, const void* gate, int64_t ld, int samples, int lanes, int k0, int k1, float* dst,
               float* column_sums);
  // a tile's rows [r0, r1) -> row-major [samples, ld]
  void (*unpack)(Scalar, const float* src, int lanes, int samples, int r0, int r1, bool relu, void* dst, int64_t ld);
  // y[row] (+)= value * x[col] over one cell; the first column tile starts from the bias (or 0)
  void (*multiply)(const Schedule&, int column_tile, int chunk, const int32_t* col, const float* values,
                   const float* bias, const float* x, int lanes, float* y);
  // products[position] += <x[col], dy[row]> over one cell
  void (*sample)(const Schedule&, int column_tile, int chunk, const int32_t* col, const float* x, const float* dy,
                 int lanes, float* products);
  // out[j] = values[index[j]] for j in [begin, end)
  void (*gather)(const float* values, const int32_t* index, int64_t begin, int64_t end, float* out);
};

const LinearKernels& linear_kernels();

}  // namespace pst
