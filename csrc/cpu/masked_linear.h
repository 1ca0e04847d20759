// y = F.linear(x, weight * mask) with the surviving weights packed by rows.
//
// Activations are packed in tiles of TILE samples: tile t holds the samples [t * TILE, ...) as [features][lanes], lanes
// being TILE or, in the last tile, what is left rounded up to 16 (zeros above the batch). So one weight multiplies
// whole vectors of samples, and a tile of `columns` features stays in L1 while all rows use it.
#pragma once
#include <cstdint>

namespace pst {

constexpr int TILE = 64;

// Rows that run side by side through one column tile. Interleaved: entry j * width + i is the j-th nonzero of row[i], padded
// with zero weights to the longest row's count, a single row's to a multiple of GROUP that only dW reads. Shared: neighbours
// that run as a dense block, entry j * GROUP + i is row[i]'s weight, possibly zero, in the j-th column that any of them has.
constexpr int GROUP = 4;
struct Group {
  int32_t row[GROUP];
  int32_t length;
  int32_t width;  // GROUP, or 1 for the rows left over
  int32_t entries() const { return (length * width + GROUP - 1) / GROUP * GROUP; }
};

// GROUP neighbouring rows that have the same runs of columns in a cell, as those of a block mask: dense blocks, whose columns
// need no index and whose weights are put in order by copies (weight by weight it was 10% of a step at 20% sparsity).
struct Exact {
  int32_t row;      // the first
  int32_t columns;  // of all runs
  int32_t weights;  // in order: from entries() + weights on, GROUP a column
  int32_t at;       // into exact_at: where in the values each row's begin or, by columns, where each column's GROUP begin
  int32_t run, runs;  // into exact_run
  int32_t strips;
};
struct Run {
  uint16_t column, length;  // within the column tile
  int strips() const { return (length + 15) / 16; }
};

// In dW groups run in strips of 16 columns: the runs of an exact one, and a shared one's whose columns are near each other,
// each strip from the first column that those before it leave: the place of the column that starts the next one.
inline int end_of_strip(const uint16_t* column, int j, int length) {
  const int stop = column[j * GROUP] + 16;
  if (j + 16 <= length && column[(j + 15) * GROUP] == stop - 1) return j + 16;
  while (j < length && column[j * GROUP] < stop) ++j;
  return j;
}
// Strips hold at most this many columns for one that the group has: 8x1 blocks are as fast either way at 1.25 and 1.1 times
// as fast column by column at 1.4
constexpr double STRIP_WASTE = 1.25;
constexpr int MOST_CHUNKS = 8;
constexpr int STRIP_SAMPLES = 2 * TILE;  // whose products are summed in registers

// Built once per mask (build_schedule). Rows are cut into chunks of about equal nonzeros; a cell is a chunk's part of a
// column tile. A cell's exact groups come first, then shared ones, those that dW takes in strips before the others. The other
// rows are sorted by their nonzeros, so a group pads little and trip counts repeat: branches predict. Entries lie in the
// order in which they are used, so they stream.
struct Schedule {
  int columns = 0;  // features a column tile
  int column_tiles = 0;
  int chunks = 0;
  const int32_t* chunk_row = nullptr;  // [chunks + 1]
  const int32_t* first = nullptr;      // [PARTS * cells + 1] into groups: a cell's parts in their order
  const int32_t* position = nullptr;   // [PARTS * cells + 1] into entries, multiples of 16
  const Group* groups = nullptr;
  const int32_t* source = nullptr;     // [entries] index into the layer's values, -1 for padding
  const uint16_t* column = nullptr;    // [entries] within the column tile

  bool by_columns = false;               // of a transposed pattern: its rows' values are not side by side
  const int32_t* exact_first = nullptr;  // [cells + 1] into exact
  const Exact* exact = nullptr;          // and one behind the last
  const int32_t* exact_at = nullptr;
  const Run* exact_run = nullptr;

  enum Part { STRIPS, SHARED, REST, PARTS };
  int part(int column_tile, int chunk, Part part) const { return PARTS * (column_tile * chunks + chunk) + part; }
  int64_t cells() const { return int64_t(column_tiles) * chunks; }
  int64_t entries() const { return position[PARTS * cells()]; }
  int64_t in_order() const { return entries() + exact[exact_first[cells()]].weights; }  // floats

  // floats between two samples of a column tile in dW: a strip may begin at the last column
  int64_t strip_stride() const { return (columns + 15) / 16 * 16 + 16; }
  struct Strips {
    int64_t groups = 0, most = 0;  // of a cell, exact ones and others; strips at most
    // floats that sample_strips takes for it, besides STRIP_SAMPLES * strip_stride()
    int64_t memory() const { return (most * (GROUP * 16 + 1) + groups + 15) / 16 * 16; }
  };
  Strips strips(int column_tile, int chunk) const {
    const int p = part(column_tile, chunk, STRIPS), cell = p / PARTS;
    Strips found;
    for (int e = exact_first[cell]; e < exact_first[cell + 1]; ++e) found.most += exact[e].strips;
    found.groups = exact_first[cell + 1] - exact_first[cell] + first[p + 1] - first[p];
    found.most += int64_t(double(position[p + 1] - position[p]) * STRIP_WASTE / (GROUP * 16));
    return found;
  }
};

enum class Scalar { f32, bf16 };

// Memory that the next tile reads, brought into L2 bit by bit while a cell runs: columns come in random order, so the
// hardware does not foresee them. Empty: nothing.
struct Ahead {
  const float* from = nullptr;
  int64_t floats = 0;

  // part i of n
  Ahead part(int64_t i, int64_t n) const {
    const int64_t begin = floats * i / n / 16 * 16, end = i + 1 == n ? floats : floats * (i + 1) / n / 16 * 16;
    return {from + begin, end - begin};
  }
};

struct LinearKernels {
  // row-major [samples, ld] -> a tile's columns [k0, k1); gate: take 0 where gate <= 0 (ReLU backward);
  // column_sums (or null) += sums over the samples
  void (*pack)(Scalar, const void* src, const void* gate, int64_t ld, int samples, int lanes, int k0, int k1, float* dst,
               float* column_sums);
  // a tile's rows [r0, r1) -> row-major [samples, ld]
  void (*unpack)(Scalar, const float* src, int lanes, int samples, int r0, int r1, bool relu, void* dst, int64_t ld);
  // features [k0, k1) of a tile: dst = src where gate > 0, else 0 (nothing is written without a gate); column_sums as above
  void (*gate)(const float* src, const float* gate, int lanes, int k0, int k1, float* dst, float* column_sums);
  // in place, a multiple of 16
  void (*relu)(float* y, int64_t count);
  // y[row] (+)= weight * x[column] over one cell; the first column tile starts from the bias (or 0)
  void (*multiply)(const Schedule&, int column_tile, int chunk, const float* weights, const float* bias, const float* x,
                   int lanes, float* y, Ahead);
  // products[entry] += <x[column], dy[row]> over the interleaved groups of one cell
  void (*sample)(const Schedule&, int column_tile, int chunk, const float* x, const float* dy, int lanes,
                 float* products, Ahead x_ahead, Ahead dy_ahead);
  // the same over the shared groups out of strips, for whole batch tiles of in and out features, `padded` samples together
  void (*sample_shared)(const Schedule&, int column_tile, int chunk, const float* x, int64_t in, const float* dy,
                        int64_t out, int64_t padded, float* products);
  // the values' gradient = <x[column], dy[row]> over the exact groups and the shared ones in strips of chunks [c0, c1), all
  // samples of a batch that is not empty; memory: STRIP_SAMPLES * strip_stride() and each cell's strips
  void (*sample_strips)(const Schedule&, int column_tile, int c0, int c1, const float* x, int64_t in, const float* dy,
                        int64_t out, int64_t padded, float* memory, float* grad);
  // weights[e] = values[source[e]], 0 for padding, for e in [begin, end)
  void (*gather)(const float* values, const int32_t* source, int64_t begin, int64_t end, float* weights);
  // the same of exact groups [begin, end); weights: all of the schedule's
  void (*gather_exact)(const Schedule&, const float* values, int64_t begin, int64_t end, float* weights);
};

const LinearKernels& linear_kernels();

}  // namespace pst
