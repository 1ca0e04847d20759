#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace pst {

Isa best_isa() {
#if PST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

const char* isa_name(Isa i) {
  return i == Isa::avx512 ? "avx512" : i == Isa::avx2 ? "avx2" : "portable";
}

static Isa parse(const std::string& name) {
  const Isa best = best_isa();
  if (name.empty()) return best;
  for (Isa i : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name != isa_name(i)) continue;
    if (i > best) throw std::runtime_error("this CPU does not run " + name + "; its best is " + isa_name(best));
    return i;
  }
  throw std::runtime_error("unknown instruction set '" + name + "'; known: portable, avx2, avx512");
}

static Isa& current() {
  static Isa value = [] {
    const char* env = std::getenv("PST_CPU_ISA");
    return parse(env ? env : "");
  }();
  return value;
}

Isa isa() { return current(); }

void set_isa(const std::string& name) { current() = parse(name); }

}  // namespace pst
