// Run-time choice of instruction set. A kernel is written once with vector extensions in a *.inl file and compiled
// three times under PST_TARGET_BEGIN_* (each_isa.inl); callers pick with PST_PICK.
#pragma once
#include <string>

namespace pst {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// what this machine can run, lowered by PST_CPU_ISA=portable|avx2|avx512 or set_isa()
Isa isa();
Isa best_isa();
const char* isa_name(Isa);
// empty name: back to the machine's best; throws std::runtime_error on an unknown or unsupported name
void set_isa(const std::string& name);

template <class T>
const T& picked(const T& portable, const T& avx2, const T& avx512) {
  const Isa now = isa();
  return now == Isa::avx512 ? avx512 : now == Isa::avx2 ? avx2 : portable;
}

}  // namespace pst

#if defined(__x86_64__)
#define PST_X86 1
// the NAME of the instruction set that isa() says, of the three that each_isa.inl made
#define PST_PICK(NAME) ::pst::picked(::pst::portable::NAME, ::pst::avx2::NAME, ::pst::avx512::NAME)
#else
#define PST_X86 0
#define PST_PICK(NAME) (::pst::portable::NAME)
#endif

#if defined(__clang__)
#define PST_TARGET_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to=function)")
#define PST_TARGET_BEGIN_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma\"))), apply_to=function)")
#define PST_TARGET_END _Pragma("clang attribute pop")
#else
#define PST_TARGET_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define PST_TARGET_BEGIN_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512\")")
#define PST_TARGET_END _Pragma("GCC pop_options")
#endif
