// What a sparse convolution on batch-tiled images needs before its loops: geometry, and pattern entries as offsets.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/tiles.h"

namespace pst {

struct ConvShape {
  int64_t n, c, h, w, o, kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t oh() const { return (h + 2 * ph - dh * (kh - 1) - 1) / sh + 1; }
  int64_t ow() const { return (w + 2 * pw - dw * (kw - 1) - 1) / sw + 1; }
  int64_t tiles() const { return (n + kLanes - 1) / kLanes; }
};

// h x w pixels inside a halo of zeros
struct Plane {
  int64_t h, w, top, left, bottom, right;
  int64_t hp() const { return h + top + bottom; }
  int64_t wp() const { return w + left + right; }
  int64_t row() const { return wp() * kLanes; }
  int64_t floats() const { return hp() * row(); }
  int64_t origin() const { return top * row() + left * kLanes; }
};

// the halo that forward reads
Plane input_plane(const ConvShape&);
// the halo around the output gradient that the input gradient reads
Plane grad_plane(const ConvShape&);

// Compressed rows on the device
struct Rows {
  const int32_t* ptr;
  const int32_t* col;
};

// One walk over output pixels with its entries: all of forward, or one phase of a strided input gradient
struct Walk {
  std::vector<int32_t> off, seg;
  std::vector<int32_t> source, channel;  // per entry: where its value sits; the channel that it reads
  std::vector<int32_t> row_begin;  // first entry of each output
  int blocks = 1;
  int64_t x_origin = 0, y_origin = 0;  // floats from the first pixel of a channel in its plane
  int64_t x_row, x_pix, y_row, y_pix;
  int64_t rows = 0, cols = 0, first = 0;  // output pixels; the image row of walk row 0
  int64_t row_step = 1;                   // image rows from one walk row to the next
};

// y = conv(x): reads `x`, writes `y`
Walk forward_walk(const ConvShape&, const Rows&, const Plane& x, const Plane& y);
// dx: reads the output gradient in `y`, writes `x`; stride_h * stride_w walks
std::vector<Walk> input_grad_walks(const ConvShape&, const Rows& transposed, const int32_t* perm, const Plane& x,
                                   const Plane& y);

// all but the values
RowsArgs rows_args(const Walk&, const float* x, float* y, int64_t outputs, int64_t y_plane, const float* bias);

constexpr int64_t kAccEntries = 4096;  // 256 KB of a 2 MB L2
int64_t longest_row(const Walk&, int64_t outputs);
// Adds one tile's products at the entries of outputs [out0, out1), with x, y and rows as args say, to grad; acc holds 16 partial
// sums for `entries` entries, or for the longest row
void weight_grad_rows(const Walk&, RowsArgs args, int64_t out0, int64_t out1, int64_t entries, float* acc, float* grad);
void sum_parts(const float* parts, int64_t count, int64_t size, float* out);

// 64-byte aligned floats that no constructor touches
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(floats ? static_cast<float*>(::operator new(size_t(floats) * sizeof(float), std::align_val_t(64))) : nullptr) {}
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> data_;
};

// zeros in the halo of one plane
void clear_halo(float* plane, const Plane&);

// An ordinary [N, C, H, W] tensor, contiguous or channels_last, of floats or, if `half`, bfloat16, beside its tiles of floats
class Image {
 public:
  Image(int64_t n, int64_t c, const Plane& plane, bool channels_last, bool half);
  // channels [c0, c1) of one tile; rows [r0, r1) for unpack, whose planes start at row r0
  void pack(const void* src, int64_t tile, float* dst, int64_t c0, int64_t c1) const;
  void unpack(const float* src, int64_t src_plane, int64_t src_row, void* dst, int64_t tile, int64_t r0, int64_t r1) const;

 private:
  int64_t n_, c_;
  Plane plane_;
  bool last_, half_;
  std::vector<int32_t> pixel_, channel_;
};

}  // namespace pst
