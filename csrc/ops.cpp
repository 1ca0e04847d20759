// The schemas, once. Each op's CPU kernel registers itself in csrc/cpu/<op>.cpp; fakes, autograd formulas and the
// plain-torch references live in pysparse_ticket/ops/<op>.py.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/tile_memory.h"

static std::string cpu_isa(std::string name) {
  if (name != "?") pst::set_isa(name);
  return pst::isa_name(pst::isa());
}

static void keep_tile_memory(int64_t bytes) { pst::keep_tile_memory(bytes); }

STABLE_TORCH_LIBRARY(pysparse_ticket, m) {
  // the instruction set in use; "?" asks, a name sets it, "" goes back to the machine's best
  m.def("cpu_isa(str name) -> str");
  // multiply-adds in registers, all threads, floating-point operations a second
  m.def("cpu_peak() -> float");
  // grad *= mask; both contiguous in the same memory format
  m.def("mask_gradient_(Tensor(a!) grad, Tensor mask) -> ()");

  // pixels: of one image innermost, in float or bfloat16; else 16 samples, in float
  m.def(
      "masked_conv2d(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor col, Tensor t_row_ptr, Tensor t_col, "
      "Tensor t_perm, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool pixels) -> Tensor");
  // x: null without need_values -> input gradient, values gradient; each empty unless needed
  m.def(
      "masked_conv2d_backward(Tensor grad, Tensor? x, Tensor values, Tensor row_ptr, Tensor col, Tensor t_row_ptr, "
      "Tensor t_col, Tensor t_perm, SymInt[] input_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool pixels, bool channels_last, bool need_input, bool need_values) -> (Tensor, Tensor)");

  // kernels/filter_conv2d.py; x and y channels_last, with removed channels where an index says which are kept
  // -> y, [2, kept filters]: mean and biased variance (empty without stats)
  m.def(
      "filter_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, SymInt out_channels, "
      "int[] stride, int[] padding, int[] dilation, bool stats) -> (Tensor, Tensor)");
  // -> gradients of x and of weight, each empty unless needed
  m.def(
      "filter_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? in_index, Tensor? out_index, int[] stride, "
      "int[] padding, int[] dilation, bool need_x, bool need_weight) -> (Tensor, Tensor)");

  // kernels/filter_conv2d_norm.py: behind a convolution, act((y - mean) / sqrt(var + eps) * weight + bias + residual);
  // channels_last images, mean and var float32 [C]
  m.def(
      "filter_conv2d_norm(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "bool relu, bool batch_stats) -> Tensor");
  // z: the output, of a ReLU behind a sum -> gradients of y and of the sum (each empty unless needed), [2, C]: of bias
  // and weight
  m.def(
      "filter_conv2d_norm_backward(Tensor grad, Tensor y, Tensor? z, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, float eps, bool relu, bool batch_stats, bool need_y, bool need_sum) -> (Tensor, Tensor, Tensor)");

  // the order in which the kernels walk a pattern (csrc/cpu/masked_linear.h)
  m.def("linear_schedule(Tensor row_ptr, Tensor col, Tensor? perm, int width, int columns) -> Tensor");
  // -> y, x in tiles (empty unless keep)
  m.def(
      "masked_linear(Tensor x, Tensor values, Tensor? bias, Tensor schedule, Tensor t_schedule, int out_features, "
      "bool relu, bool keep) -> (Tensor, Tensor)");
  // y: the output of a ReLU -> gradients of x, values and bias, each empty unless needed
  m.def(
      "masked_linear_backward(Tensor grad_y, Tensor packed_x, Tensor values, Tensor? y, Tensor schedule, "
      "Tensor t_schedule, int in_features, bool need_x, bool need_values, bool need_bias) -> (Tensor, Tensor, Tensor)");
  // Over the tiles of a mask (ops/tile_mask.py): tiles are its tensors; Triton kernels, registered from Python
  // -> y, what GELU saw (empty unless keep), masked values of x's type (empty unless keep, or where values are such)
  m.def(
      "masked_linear_tiles(Tensor x, Tensor values, Tensor? bias, Tensor[] tiles, int[] shape, int[] tile, "
      "str activation, bool clean, bool keep) -> (Tensor, Tensor, Tensor)");
  // out: y of a ReLU, or what GELU saw -> gradients of x, values (of dtype) and bias (float32), each empty unless needed
  m.def(
      "masked_linear_tiles_backward(Tensor grad, Tensor x, Tensor values, Tensor? out, Tensor[] tiles, int[] shape, "
      "int[] tile, str activation, ScalarType dtype, bool need_x, bool need_values, bool need_bias) "
      "-> (Tensor, Tensor, Tensor)");
  // The same of a convolution (ops/conv_tiles.py), x and y channels_last -> y, masked values as above
  m.def(
      "masked_conv2d_tiles(Tensor x, Tensor values, Tensor? bias, Tensor[] tiles, int[] shape, int[] tile, "
      "int[] stride, int[] padding, int[] dilation, bool clean, bool keep) -> (Tensor, Tensor)");
  // -> gradients of x and of values (of dtype), each empty unless needed
  m.def(
      "masked_conv2d_tiles_backward(Tensor grad, Tensor x, Tensor values, Tensor[] tiles, int[] shape, int[] tile, "
      "int[] stride, int[] padding, int[] dilation, ScalarType dtype, bool need_x, bool need_values) "
      "-> (Tensor, Tensor)");
  // Chains of linear layers on tiles, flat tensors (csrc/cpu/masked_linear.h); x [samples, features]
  m.def("linear_pack(Tensor x) -> Tensor");
  m.def("linear_unpack(Tensor tiles, SymInt samples, SymInt features) -> Tensor");
  // gated: the ReLU's gate is already in the gradient that comes back; gate_x: x is such a ReLU's output
  m.def(
      "tiled_linear(Tensor x, Tensor values, Tensor? bias, Tensor schedule, Tensor t_schedule, SymInt samples, "
      "int in_features, int out_features, bool relu, bool gated, bool gate_x) -> Tensor");
  // y: the output of a ReLU that is not gated -> gradients of x, values and bias, each empty unless needed
  m.def(
      "tiled_linear_backward(Tensor grad, Tensor x, Tensor values, Tensor? y, Tensor schedule, Tensor t_schedule, "
      "SymInt samples, int in_features, int out_features, bool gate_x, bool need_x, bool need_values, bool need_bias) "
      "-> (Tensor, Tensor, Tensor)");
  // how many bytes of freed tiles are kept for the next ones (csrc/cpu/tile_memory.h)
  m.def("keep_tile_memory(int bytes) -> ()");
  // Chains of layers on batch tiles [ceil(n / 16), C, H + 2 halo, W + 2 halo, 16]
  m.def("tile_pack(Tensor x, int halo) -> Tensor");
  m.def("tile_unpack(Tensor tiles, SymInt n, int halo, bool channels_last) -> Tensor");
  m.def("tiled_mean(Tensor tiles, SymInt n, int halo) -> Tensor");
  m.def("tiled_mean_backward(Tensor grad, SymInt h, SymInt w, int halo) -> Tensor");
  // act(norm(conv(x)) + residual); batch statistics unless mean and var are given; norm false: conv(x) + bias
  // -> output, convolution alone [tiles, O, H, W, 16] (empty without norm), [3, O]: mean, 1 / sqrt(var + eps), biased variance
  m.def(
      "tiled_conv2d(Tensor x, Tensor values, Tensor row_ptr, Tensor col, Tensor? weight, Tensor? bias, Tensor? mean, "
      "Tensor? var, Tensor? residual, SymInt n, int halo, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool norm, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  // pass is added to the gradient of x; z is given where the ReLU cannot be recomputed from y: after a residual, or without norm
  // -> gradients of x, of values, [2, O] of norm weight and bias, of residual; empty unless needed
  m.def(
      "tiled_conv2d_backward(Tensor grad, Tensor? pass_grad, Tensor x, Tensor y, Tensor? z, Tensor stats, Tensor values, "
      "Tensor row_ptr, Tensor col, Tensor t_row_ptr, Tensor t_col, Tensor t_perm, Tensor? weight, Tensor? bias, SymInt n, "
      "int halo, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool norm, bool batch_stats, bool relu, "
      "bool need_x, bool need_values, bool need_norm, bool need_residual) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same chain cut between convolution and norm: y = conv(act(norm(x) + residual)), where x is the convolution alone of
  // the layer before and stats are its [3, C]; without stats y = conv(x). mean and var are those of y's own norm
  // -> y [tiles, O, H + 2 halo, W + 2 halo, 16], its stats, the convolution's input (empty unless keep)
  m.def(
      "tiled_norm_conv2d(Tensor x, Tensor? stats, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, bool keep, "
      "Tensor values, Tensor row_ptr, Tensor col, Tensor? mean, Tensor? var, SymInt n, int halo, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, float eps) -> (Tensor, Tensor, Tensor)");
  // The gradient of y is grad * terms[0] + terms[1] + (y - mean) * terms[2], a channel each
  // -> gradient of x and of the residual alike, terms of x's norm, [2, C] of its weight and bias, gradient of values
  m.def(
      "tiled_norm_conv2d_backward(Tensor grad, Tensor grad_terms, Tensor? pass_grad, Tensor y, Tensor y_stats, Tensor x, "
      "Tensor? z, Tensor? stats, Tensor? weight, Tensor? bias, bool relu, bool batch_stats, Tensor values, Tensor row_ptr, "
      "Tensor col, Tensor t_row_ptr, Tensor t_col, Tensor t_perm, SymInt n, int halo, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, bool need_x, bool need_values) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "tiled_norm(Tensor y, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, int halo, bool relu) -> Tensor");
  // -> gradient behind the ReLU (empty without one), terms, [2, C] of weight and bias
  m.def(
      "tiled_norm_backward(Tensor grad, Tensor y, Tensor? z, Tensor stats, Tensor? weight, Tensor? bias, SymInt n, int halo, "
      "bool relu, bool batch_stats) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("keep_tile_memory", TORCH_BOX(&keep_tile_memory));
}
