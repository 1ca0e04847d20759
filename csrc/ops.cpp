// The schemas, once. Each op's CPU kernel registers itself in csrc/cpu/<op>.cpp; fakes, autograd formulas and the
// plain-torch references live in pysparse_ticket/ops/<op>.py.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

static std::string cpu_isa(std::string name) {
  if (name != "?") pst::set_isa(name);
  return pst::isa_name(pst::isa());
}

STABLE_TORCH_LIBRARY(pysparse_ticket, m) {
  // the instruction set in use; "?" asks, a name sets it, "" goes back to the machine's best
  m.def("cpu_isa(str name) -> str");

  // -> y, x in tiles (empty unless keep)
  m.def(
      "masked_conv2d(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor col, Tensor t_row_ptr, Tensor t_col, "
      "Tensor t_perm, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool keep) -> (Tensor, Tensor)");
  // -> input gradient, values gradient; each empty unless needed
  m.def(
      "masked_conv2d_backward(Tensor grad, Tensor packed, Tensor values, Tensor row_ptr, Tensor col, Tensor t_row_ptr, "
      "Tensor t_col, Tensor t_perm, SymInt[] input_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool channels_last, bool need_input, bool need_values) -> (Tensor, Tensor)");

  // csrc/cpu/masked_linear.cpp
  m.def("linear_schedule(Tensor row_ptr, Tensor col, int width, int columns) -> Tensor");
  m.def(
      "masked_linear(Tensor x, Tensor values, Tensor? bias, Tensor col, Tensor t_col, Tensor t_perm, Tensor schedule, "
      "Tensor t_schedule, int out_features, bool relu, bool keep) -> (Tensor, Tensor)");
  m.def(
      "masked_linear_backward(Tensor grad_y, Tensor packed_x, Tensor values, Tensor? y, Tensor col, Tensor t_col, "
      "Tensor t_perm, Tensor schedule, Tensor t_schedule, int in_features, bool need_x, bool need_values, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
