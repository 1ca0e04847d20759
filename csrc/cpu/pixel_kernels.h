// Sparse convolution with pixels innermost: a weight multiplies vectors of neighbouring pixels of one image.
//
// The image that is read is copied once into planes, one a channel and tap column (pixel_plan.h), in which the pixels of
// successive output rows lie one behind the other for every tap: loads need no bounds checks, cross no row ends and, for
// most taps, start on a cache line, where a load at any pixel of a plain image with a halo would take two.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace pst {

struct PixelArgs {
  const float* x;        // planes of the first sample
  int64_t x_sample;      // floats from one sample to the next
  void* y;               // output of the first sample; read by weight_grad
  int64_t y_sample, y_plane;  // elements from one sample, or output channel, to the next
  bool half;             // y is bfloat16, else float
  int64_t samples, pixels;    // pixels a sample and output channel, consecutive in y
  int out0, out1;        // output channels
  int outputs;           // row length of seg
  int blocks;            // blocks of input channels, each small enough for L1
  const int32_t* seg;    // [blocks + 1, outputs]: entries of output o in block b are seg[b][o] .. seg[b + 1][o]
  const int32_t* off;    // floats from x to what entry k multiplies with output pixel 0
  const float* val;
  const float* bias;     // per output, or null
  float* part;           // sums between two blocks: registers * lanes floats an output of [out0, out1)
  float* acc;            // weight gradient: `lanes` partial sums an entry, entry acc0 first
  int64_t acc0;
};

// One sample's image to its planes (PixelPlan)
struct PackColumn {
  int64_t width, start;    // plane row: the image's columns start, start + col_stride, ...
  int64_t plane, end;      // floats in a channel's planes
  const uint32_t* mask;    // of a plane row, or of all rows where flat: 0 where the column lies outside the image
  bool flat;               // plane rows are image rows, shifted, one behind the other
};
struct PackRows {
  int64_t before, count, after;  // plane rows: zeros, image rows from `first` in steps of row_stride, zeros
  int64_t first;
};
struct PackArgs {
  const void *src, *lo, *hi;  // nothing outside [lo, hi) is read
  bool half;                  // bfloat16, else float
  int64_t channels, src_channel, src_row, row_stride, col_stride;
  const PackColumn* columns;
  int64_t column_count;
  const PackRows* rows;
  int64_t row_count;
  const uint8_t* used;        // [channels, columns]: planes that some entry reads
  int64_t channel_floats;
  bool clean;                 // the zeros are there, from another image with the same rows
  float* dst;                 // may be written up to `lanes` floats behind its end
};

struct PixelKernels {
  int lanes, registers;  // floats a vector, vectors of sums held at once
  void (*rows)(const PixelArgs&);
  void (*weight_grad)(const PixelArgs&);
  // out[k] += sum over the lanes of acc[k]
  void (*reduce)(const float* acc, float* out, int64_t count);
  void (*pack)(const PackArgs&);
  // dst[step * j] = src[j]
  void (*spread)(const float* src, void* dst, bool half, int64_t step, int64_t count);
  // dst[2 * j] = even[j], dst[2 * j + 1] = odd[j]
  void (*interleave)(const float* even, const float* odd, void* dst, bool half, int64_t count);
};

const PixelKernels& pixel_kernels();

// samples that share one register block where a sample has `pixels` pixels
inline int64_t samples_at_once(const PixelKernels& k, int64_t pixels, int64_t samples) {
  const int64_t vectors = (pixels + k.lanes - 1) / k.lanes;
  for (int64_t r : {4, 2})
    if (samples >= r && vectors * r <= k.registers) return r;
  return 1;
}

}  // namespace pst
