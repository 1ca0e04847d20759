// Batch-tiled images: [ceil(N / 16), C, Hp, Wp, 16], 16 samples innermost, so that one pixel of one channel is one cache
// line and a weight multiplies it in one instruction. A plane of H x W pixels may sit in a halo of zeros (Hp x Wp).
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace pst {

constexpr int kLanes = 16;
constexpr int kGroup = 4;  // output channels that share the pixels that they load

// Products of one tile's planes with sparse rows; the same loops serve the output, the input gradient (transposed
// pattern, flipped taps) and the weight gradient (then y is read).
struct RowsArgs {
  const float* x;         // pixel (0, 0) of the first tap at output (0, 0)
  float* y;               // pixel (0, 0) of output 0
  int64_t x_row, x_pix;   // floats from one output row or pixel to the next, on x
  int64_t y_row, y_pix;   // the same on y
  int64_t y_plane;        // floats from one output channel to the next
  int row0, row1, cols;   // output rows [row0, row1) and columns [0, cols)
  int out0, out1;         // output channels
  int outputs;            // row length of seg
  int blocks;             // blocks of input channels, each small enough for L1
  const int32_t* seg;     // [blocks + 1, outputs]: entries of output o in block b are seg[b][o] .. seg[b + 1][o]
  const int32_t* off;     // floats from x to the pixel that entry k reads
  const float* val;
  const float* bias;      // per output, or null
  const float* start;     // added to the products, laid out as y; or null
  float* moments;         // per output [3][16]: origin, sums of y - origin and of its square; or null
  bool fresh;             // moments start at output pixel (0, 0)
  // behind a norm and a ReLU: the value is kept where that ReLU was open, and summed for the norm's gradient
  const float* gate_y;    // the norm's input, laid out as y; or null
  const float* gate_z;    // the ReLU's output, laid out as y; null: its sign is recomputed from gate_y
  const float *gate_scale, *gate_shift, *gate_mean;  // per output: normalised = gate_y * scale + shift
  float* gate_sums;       // per output [2][16], added to: of the kept values, of those times (gate_y - mean)
  bool relu;
  float* acc;             // weight gradient: 16 partial sums an entry, entry acc0 first
  int64_t acc0;
  // groups of kGroup outputs, out0 a multiple of it; a pattern is the set of a group's outputs that have a weight in a column
  int group_blocks, groups;
  const int32_t* group_seg;    // [blocks, groups, 16]: columns of pattern p are seg[p - 1] .. seg[p]
  const int32_t* group_first;  // [blocks, groups]: first weight
  const int32_t* group_off;    // per column, as off
  const float* group_val;      // per column, its outputs' weights
};

// One plane of one channel: rows x cols pixels, each operand with its own row step in floats
struct NormPlane {
  const float* y;        // convolution output
  const float* g;        // gradient of the output; the residual input in norm_act
  const float* z;        // the layer's output, rows as g, where the ReLU reads it; null: recomputed from y
  float* out;            // null: norm_act writes hot alone
  float* hot;            // norm_act's result once more, for a reader that comes at once; or null
  int64_t y_row, g_row, out_row, hot_row, rows, cols;
  int64_t out_halo;      // zeros left and right of each row of out
  float scale, shift;    // y * scale + shift is the normalised value
  float mean, constant, slope;  // gradient of y: g * scale + constant + (y - mean) * slope
  float* sums;           // [2][16]: of g, of g * (y - mean)
  int lanes;             // samples in this tile
  bool relu;
};

struct TileKernels {
  int max_rows, max_cols;  // pixels of one register block
  void (*rows)(const RowsArgs&);
  void (*weight_grad)(const RowsArgs&);
  // out[k] += sum over the 16 lanes of acc[k]
  void (*reduce)(const float* acc, float* out, int64_t count);
  // src: `lanes` samples, sample_stride apart, `count` consecutive elements each, bfloat16 if `half`, else float; element j
  // goes to the line dst + table[j]
  void (*pack)(const void* src, bool half, int64_t sample_stride, int lanes, float* dst, const int32_t* table, int64_t count);
  void (*unpack)(const float* src, const int32_t* table, void* dst, bool half, int64_t sample_stride, int lanes, int64_t count);
  void (*norm_act)(const NormPlane&);   // out = act(y * scale + shift + g)
  void (*norm_sums)(const NormPlane&);  // sums, and out = g behind the ReLU if out is given
  void (*norm_grad)(const NormPlane&);  // out = gradient of y
  void (*plane_sum)(const float* x, int64_t row, int64_t rows, int64_t cols, float* out);
};

const TileKernels& tile_kernels();

struct GroupKernels {
  int max_rows, max_cols;           // pixels of one register block
  void (*rows)(const RowsArgs&);
  // sums[k] += products of weight k of `count`, which are those of outputs [out0, out1) in the order of use; acc: 16 floats each
  void (*weight_grad)(const RowsArgs&, int64_t count, float* sums);
};

const GroupKernels& group_kernels();

}  // namespace pst
