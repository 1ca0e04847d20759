// What this machine can multiply and add at most, the roof of the benchmarks' tables.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace pst {

namespace portable {
#define PST_W 4
#include "cpu/peak.inl"
#undef PST_W
}  // namespace portable

#if PST_X86
PST_TARGET_BEGIN_AVX2
namespace avx2 {
#define PST_W 8
#include "cpu/peak.inl"
#undef PST_W
}  // namespace avx2
PST_TARGET_END

PST_TARGET_BEGIN_AVX512
namespace avx512 {
#define PST_W 16
#include "cpu/peak.inl"
#undef PST_W
}  // namespace avx512
PST_TARGET_END
#endif

// floating-point operations per second of all torch threads together: the best of a few runs of some milliseconds
static double cpu_peak() {
  double (*run)(int64_t) = portable::chains;
  int lanes = 4;
#if PST_X86
  if (isa() == Isa::avx2) run = avx2::chains, lanes = 8;
  if (isa() == Isa::avx512) run = avx512::chains, lanes = 16;
#endif
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
