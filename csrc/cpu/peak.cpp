// What this machine can multiply and add at most, the roof of the benchmarks' tables.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "cpu/parallel.h"

#define PST_SOURCE "cpu/peak.inl"
#include "cpu/each_isa.inl"

namespace pst {

// floating-point operations per second of all torch threads together: the best of a few runs of some milliseconds
static double cpu_peak() {
  double (*const run)(int64_t) = PST_PICK(chains);
  const int lanes = PST_PICK(W);
  constexpr int64_t ROUNDS = 2'000'000;
  const int64_t threads = num_threads();
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    parallel_ranges(threads, threads, [&](int64_t, int64_t, int64_t) {
      volatile double keep = run(ROUNDS);
      (void)keep;
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double rate = 2.0 * portable::CHAINS * lanes * ROUNDS * threads / seconds;
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace pst

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CompositeExplicitAutograd, m) {
  m.impl("cpu_peak", TORCH_BOX(&pst::cpu_peak));
}
