// How the channels of a batch-tiled convolution are computed: in groups that share the pixels that they load, or one by one
#pragma once
#include <memory>
#include <vector>

#include "cpu/conv_plan.h"

namespace pst {

// kGroup consecutive outputs of a walk each; columns sorted by block of channels, by group and by pattern (tiles.h)
struct Groups {
  int blocks = 1;
  int64_t count = 0;
  std::vector<int32_t> seg, first, off;
  std::vector<int32_t> source;  // per weight: where its value sits, -1 for a zero that fills a pattern up
};

// outputs [out0, out1) of a walk that one kernel takes
struct Run {
  int64_t out0, out1;
  bool grouped;
};
using Runs = std::vector<Run>;

struct ConvPlan {
  Walk walk;
  Groups groups;
  Runs runs, grad_runs;
  int64_t outputs;
};

// A convolution's plans with this call's values. Plans are kept from call to call and found by geometry and pattern.
class ConvWalks {
 public:
  // reads `x`, writes `y`: one plan
  static ConvWalks forward(const ConvShape&, const Rows&, const float* values, const Plane& x, const Plane& y);
  // reads the output gradient in `y`, writes `x`: stride_h * stride_w plans
  static ConvWalks input_grad(const ConvShape&, const Rows& transposed, const int32_t* perm, const float* values, const Plane& x,
                              const Plane& y);

  int64_t size() const { return plans_ ? int64_t(plans_->size()) : 0; }
  const Walk& walk(int64_t i) const { return (*plans_)[i].walk; }
  // all outputs, or those in [out0, out1), out0 a multiple of kGroup; the epilogue, rows and outputs are as args say
  void rows(int64_t i, RowsArgs args) const;
  RowsArgs args(int64_t i, const float* x, float* y, int64_t y_plane, const float* bias) const;

  // floats of scratch that weight_grad wants
  int64_t grad_scratch() const;
  // plan 0: adds one tile's products at outputs [out0, out1), over output rows [row0, row1), to grad, one number a value;
  // ranges of outputs that follow one another do all of their products once
  void weight_grad(const float* x_tile, const float* grad_tile, const Plane& grad_plane, int64_t out0, int64_t out1, int64_t row0,
                   int64_t row1, float* scratch, float* grad) const;

 private:
  std::shared_ptr<const std::vector<ConvPlan>> plans_;
  std::vector<std::vector<float>> values_, group_values_;
  const float* given_ = nullptr;
  int64_t longest_ = 0;
};

}  // namespace pst
