// How the unstructured products walk a pattern on the GPU.
//
// Activations are packed feature-major in tiles of 128 bytes of samples: tile t holds the samples [t * TOKENS, ...) as
// [features][TOKENS], TOKENS being 32 floats or 64 values of 16 bits, zeros above the batch. A thread owns a row of the
// weight and multiplies each of its nonzeros with the 128 bytes of that column; its sums stay in registers. The threads of a
// warp read different columns: thread i begins with 16-byte chunk i % 8 and goes round, so that eight of them always meet
// eight different chunks, and no two of them the same bank.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pst::cuda {

constexpr int ROW_BYTES = 128;  // samples of a feature in a tile
constexpr int CHUNKS = ROW_BYTES / 16;
constexpr int WARP = 32;
constexpr int ROWS = 512;  // a chunk of the weight's rows, a thread each
constexpr int WARPS = ROWS / WARP;

// Columns pass through a ring of stages in shared memory. While stage s is worked on, s + 1 is on its way and the columns of
// the LAG stages before are still there: a nonzero may wait that long, so that the 32 rows of a warp have the same number
// of nonzeros to multiply in each stage though their columns are scattered.
constexpr int RING = 6;
constexpr int LAG = RING - 2;

// Where a product finds its things, in 32-bit words from the schedule's begin. A group is 32 entries, one of each thread of
// a warp. Built once per mask (linear_schedule.cpp); the kernels read it on the device, nothing of it is known on the host.
struct Header {
  int32_t rows, width, nnz;
  int32_t columns;  // a stage's
  int32_t stages;
  int32_t groups;
  int32_t row;     // [chunks * ROWS] the row of a thread, -1 for none
  int32_t first;   // [chunks * WARPS * stages + 1] into groups
  int32_t source;  // [groups * 32] index into the layer's values, -1 for padding
  int32_t slot;    // [groups * 32] uint16: the column's place in the ring; RING * columns is a row of zeros
  // The weight gradient's own walk, cells = 0 in a transposed schedule: a cell is a chunk's part of a range of columns
  int32_t cells;
  int32_t cell_columns;
  int32_t cell_groups;
  int32_t cell_row;     // [cells * ROWS]
  int32_t cell_first;   // [cells * WARPS + 1] into cell_groups
  int32_t cell_source;  // [cell_groups * 32]
  int32_t cell_slot;    // [cell_groups * 32] uint16: the column within the cell
};
constexpr int HEADER = sizeof(Header) / 4;

__host__ __device__ constexpr int chunks_of(int64_t rows) { return int((rows + ROWS - 1) / ROWS); }

// Bytes of shared memory: one block of 512 threads has those of a multiprocessor
constexpr int LEAST_BUDGET = 96 * 1024;
struct Budget {
  int bytes;

  int columns() const { return (bytes - ROW_BYTES) / (RING * ROW_BYTES) / 8 * 8; }
  __host__ __device__ static constexpr int ring_bytes(int columns) { return (RING * columns + 1) * ROW_BYTES; }
  // of a cell's sums, beside the rows of the gradient and two buffers of columns
  int cell_sums(int columns) const { return (bytes - ROWS * ROW_BYTES - 2 * columns * ROW_BYTES) / 4; }
};

}  // namespace pst::cuda
