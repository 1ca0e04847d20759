// Geometry of a sparse convolution with pixels innermost: how the image that is read lies in planes, and pattern entries
// as offsets into them.
//
// Forward reads x[i * stride + tap * dilation - padding]. The input gradient reads the output gradient the same way,
// without a stride, once for every phase of the image (rows and columns of equal remainder by the stride), and writes that
// phase. So both are: output row i of a phase reads row i * row_stride + (a number of the tap's row), columns alike.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/conv_plan.h"
#include "cpu/pixel_kernels.h"

namespace pst {

// One grid of output pixels with its entries
struct PixelWalk {
  int64_t rows = 0, cols = 0;                   // the grid
  int64_t row0, row_step, col0, col_step;       // its place in the image that is written
  std::vector<int32_t> begin, off, seg;         // first entry of each output; PixelArgs::off and seg
  std::vector<float> own_val;
  const float* val = nullptr;
  int blocks = 1;
};

struct PixelPlan {
  int64_t n, channels, h, w;         // the tensor that is read
  int64_t outputs, out_h, out_w;     // the one that is written
  int64_t row_stride, col_stride;
  // a plane holds, for the tap column that it serves, the columns [start + col_stride * j] of rows in classes of equal
  // remainder by row_stride: class f holds the rows (lo + i) * row_stride + f
  struct Column {
    int64_t width, start, plane, mask;
    bool flat;  // plane rows are as long as image rows, so that one copy moves them all
  };
  struct RowClass {
    int64_t lo, rows, base;
  };
  std::vector<Column> columns;
  std::vector<RowClass> classes;
  std::vector<int64_t> tap_row;      // plane row that tap row ky reads for output row 0
  std::vector<uint32_t> masks;
  std::vector<uint8_t> used;         // [channels, columns]
  int64_t channel_floats = 0, sample_floats = 0;
  bool direct = false;               // planes would be the tensor itself
  int64_t group = 1, groups = 1;     // samples that run together
  int64_t band = 1, bands = 1;       // grid rows that run together
  int64_t parts = 1;                 // pieces of the outputs, of about equal entries
  std::vector<PixelWalk> walks;

  int64_t items() const { return groups * bands * parts; }
  int64_t samples(int64_t g) const { return std::min(group, n - g * group); }
  // fills the planes of group g, band b; clean: they last held the same band of as many samples
  void pack(const void* src, bool half, int64_t g, int64_t b, bool clean, float* dst) const;
};

// Rebuilt in place, so that the memory of its tables is kept
void forward_plan(PixelPlan&, const ConvShape&, const Rows&, const float* values, bool half, int64_t threads);
void input_grad_plan(PixelPlan&, const ConvShape&, const Rows& transposed, const int32_t* perm, const float* values, bool half,
                     int64_t threads);

// outputs [first, second) of part p
std::pair<int, int> part_outputs(const PixelWalk&, int64_t outputs, int64_t p, int64_t parts);

}  // namespace pst
