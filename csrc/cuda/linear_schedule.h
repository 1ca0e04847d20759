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
  // The weight gradient's own walk, cells = 0 in a transposed schedule: a cell is up to ROWS pieces of rows in a
  // range of columns; rows with many weights there are several pieces, rows with none are not there
  int32_t cells;
  int32_t cell_columns;
  int32_t cell_groups;
  int32_t cell_from;    // [cells] the first of its columns
  int32_t cell_row;     // [cells * ROWS] the row of a thread's piece, -1 for none
  int32_t cell_first;   // [cells * WARPS + 1] into cell_groups
  int32_t cell_source;  // [cell_groups * 32]
  int32_t cell_slot;    // [cell_groups * 32] uint16: the column within the cell
  // Windows on tensor cores, of WINDOW rows; tiles = 0 where there are none
  int32_t window_tiles;    // of samples a block
  int32_t window_columns;  // a stage's
  int32_t window_stages;
  int32_t window_groups;  // a group is 16 columns of a window
  int32_t window_row;     // [chunks][warps][windows a warp][WINDOW]
  int32_t window_first;   // [chunks][warps][stages][windows a warp] + 1, into window_groups
  int32_t window_slot;    // [window_groups + 1][16] uint16: the columns' places in the ring
  int32_t window_place;   // [nnz] where each of the layer's values goes, in the groups' weights
  // The weight gradient by windows: a cell is WARPS windows of rows of about one length and columns, of which each window
  // has at most MOST_CELL_GROUPS groups; cells = 0 where there are none
  int32_t gradient_cells;
  int32_t gradient_place;   // [cells + 1] into columns
  int32_t gradient_column;  // a cell's columns in the order of their places in shared memory, -1 for none
  int32_t gradient_row;     // [cells][WARPS][WINDOW]
  int32_t gradient_first;   // [cells][WARPS] + 1, into groups
  int32_t gradient_slot;    // [groups][16] uint16: the columns' places
  int32_t gradient_lane;    // [groups][32] uint16: which of a lane's eight sums are weights; above, how many lower lanes have
  int32_t gradient_base;    // [groups] how many the groups before have
  int32_t gradient_source;  // [nnz] index into the layer's values
};
constexpr int HEADER = sizeof(Header) / 4;

__host__ __device__ constexpr int chunks_of(int64_t rows) { return int((rows + ROWS - 1) / ROWS); }

// Bytes of shared memory: one block of 512 threads has those of a multiprocessor
constexpr int LEAST_BUDGET = 96 * 1024;
struct Budget {
  int bytes;

  int columns() const { return (bytes - ROW_BYTES) / (RING * ROW_BYTES) / 8 * 8; }
  __host__ __device__ static constexpr int ring_bytes(int columns) { return (RING * columns + 1) * ROW_BYTES; }
  // a cell's of the gradient by windows: two buffers, beside the rows of the gradient
  int range() const { return (bytes - ROWS / 2 * ROW_BYTES) / (2 * ROW_BYTES) / CHUNKS * CHUNKS; }
  // of a cell's sums, beside the rows of the gradient and two buffers of columns
  int cell_sums(int columns) const { return (bytes - ROWS * ROW_BYTES - 2 * columns * ROW_BYTES) / 4; }
};

// A window is 16 rows of the weight and the columns in which any of them has a weight. For each 16 of these columns, a
// group, a tensor core multiplies 16 samples x 16 columns with 16 columns x 16 rows: the samples' side is read from the ring
// once for 16 rows, zeros are multiplied too. A warp has 32 rows of sums for 64 samples: two windows and one tile, or one
// window and two tiles. Chunk c of a column is at c ^ slot % 8 of its place, and of the eight columns that are read together
// no two have the same slot modulo 8, as far as the window has such: no conflict of banks.
constexpr int WINDOW = 16;
constexpr int GROUP_COLUMNS = 16;
constexpr int GROUP_BYTES = WINDOW * GROUP_COLUMNS * 2;
constexpr int MOST_TILES = 2;
constexpr int MOST_CELL_GROUPS = 8;  // 64 sums a thread
constexpr int CELL_ROWS = WARPS * WINDOW;
struct WindowBudget {
  int tiles;

  __host__ __device__ constexpr int place_bytes() const { return tiles * ROW_BYTES; }
  __host__ __device__ constexpr int windows() const { return MOST_TILES / tiles; }  // a warp's
  __host__ __device__ constexpr int rows() const { return WARPS * windows() * WINDOW; }
  int chunks(int64_t n) const { return int((n + rows() - 1) / rows()); }
  // eight places of zeros end the ring
  int columns(Budget b) const { return (b.bytes - CHUNKS * place_bytes()) / (RING * place_bytes()) / CHUNKS * CHUNKS; }
  __host__ __device__ constexpr int ring_bytes(int columns) const { return (RING * columns + CHUNKS) * place_bytes(); }
};
// Which no schedule exceeds. A full group has 16 weights at least; one of few columns has one, and a large mask of many
// such has no windows.
constexpr int64_t most_groups(int64_t nnz) { return nnz < 4096 ? nnz : nnz / 14 + 3804; }

// A schedule's length tells the host of it without asking the device: modulo LENGTHS it is nnz + rows + 2 width, as a check
// that it is of this pattern, and then modulo 2 (MOST_TILES + 1) the tiles of its windows, and whether it has the gradient's.
constexpr int64_t LENGTHS = 64;
constexpr bool length_fits(int64_t length, int64_t rows, int64_t width, int64_t nnz) {
  return length > HEADER && (nnz + rows + 2 * width - length) % LENGTHS == 0;
}
constexpr int KINDS = MOST_TILES + 1;
constexpr int window_tiles(int64_t length) { return int(length / LENGTHS % KINDS); }
constexpr bool gradient_windows(int64_t length) { return length / LENGTHS / KINDS % 2; }

}  // namespace pst::cuda
