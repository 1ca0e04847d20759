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
}

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
