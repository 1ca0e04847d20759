// Sparse convolution of ordinary tensors with pixels innermost, in float or bfloat16; scratch is kept by the threads.
#pragma once
#include "cpu/conv_plan.h"
#include "cpu/tensors.h"

namespace pst {

// [N, C, H, W] -> y [N, O, oh, ow] of x's dtype and memory format
Tensor pixel_conv2d(const Tensor& x, const ConvShape&, const Rows&, const float* values, const float* bias);
// gradient of x, of grad's dtype
Tensor pixel_conv2d_input_grad(const Tensor& grad, const ConvShape&, const Rows& transposed, const int32_t* perm,
                               const float* values, bool channels_last);
// products at the entries, summed over samples and pixels, into out [nnz]
void pixel_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const ConvShape&, const Rows&, float* out);

}  // namespace pst
