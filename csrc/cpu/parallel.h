// Static split of a loop over torch's threads (torch.set_num_threads is honoured)
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace pst {

inline int64_t num_threads() { return int64_t(torch::stable::get_num_threads()); }

// f(part, begin, end) for at most `parts` ranges that cover [0, count) and begin at multiples of `unit`; f must not throw
template <class F>
void parallel_ranges(int64_t count, int64_t parts, const F& f, int64_t unit = 1) {
  const int64_t units = unit ? count / unit : 0;
  if (units == 0) return;
  if (parts > units) parts = units;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) f(p, units * p / parts * unit, units * (p + 1) / parts * unit);
  });
}

}  // namespace pst
