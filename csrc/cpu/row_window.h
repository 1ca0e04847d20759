// A few image rows of every channel of a tile, small enough for L2, that move down the image
#pragma once
#include "cpu/conv_plan.h"

namespace pst {

constexpr int64_t kWindowFloats = 256 * 1024 / 4;  // of a 2 MB L2, beside what streams through it

class RowWindow {
 public:
  // `plane`: h rows of capacity, none of them halo; sides are zeros
  RowWindow(float* data, const Plane& plane, int64_t channels, int64_t image_h)
      : data_(data), plane_(plane), channels_(channels), image_h_(image_h) {
    std::memset(data, 0, channels * plane.floats() * sizeof(float));
  }

  void restart() { lo_ = hi_ = 0; started_ = false; }

  // where image row 0 would be, left halo included
  float* image() const { return data_ - lo_ * plane_.row(); }

  // Makes it hold image rows [lo, hi), lo and hi not below the last call's; f(channel, r0, r1, first pixel of row r0) fills
  // the new rows inside the image, those outside are zeros
  template <class F>
  void move(int64_t lo, int64_t hi, const F& f) {
    const int64_t row = plane_.row(), keep = started_ && hi_ > lo ? hi_ - lo : 0, shift = lo - lo_;
    const int64_t from = lo + keep, r0 = std::min(std::max<int64_t>(from, 0), hi), r1 = std::max(r0, std::min(hi, image_h_));
    for (int64_t c = 0; c < channels_; ++c) {
      float* at = data_ + c * plane_.floats();
      if (keep && shift) std::memmove(at, at + shift * row, keep * row * sizeof(float));
      std::memset(at + (from - lo) * row, 0, (r0 - from) * row * sizeof(float));
      if (r1 > r0) f(c, r0, r1, at + (r0 - lo) * row + plane_.left * kLanes);
      std::memset(at + (r1 - lo) * row, 0, (hi - r1) * row * sizeof(float));
    }
    lo_ = lo;
    hi_ = hi;
    started_ = true;
  }

 private:
  float* data_;
  Plane plane_;
  int64_t channels_, image_h_, lo_ = 0, hi_ = 0;
  bool started_ = false;
};

}  // namespace pst
