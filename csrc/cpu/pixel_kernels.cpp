#include "cpu/pixel_kernels.h"

#include <cstring>
#include <utility>

#define PST_KERNELS static const PixelKernels kKernels = {W, kRegisters, rows, weight_grad, reduce, pack, spread, interleave}

namespace pst {

namespace portable {
#define PST_W 4
#define PST_REGISTERS 12
#include "cpu/pixel_kernels.inl"
PST_KERNELS;
#undef PST_W
#undef PST_REGISTERS
}  // namespace portable

#if PST_X86
PST_TARGET_BEGIN_AVX2
namespace avx2 {
#define PST_W 8
#define PST_REGISTERS 12
#include "cpu/pixel_kernels.inl"
PST_KERNELS;
#undef PST_W
#undef PST_REGISTERS
}  // namespace avx2
PST_TARGET_END

PST_TARGET_BEGIN_AVX512
namespace avx512 {
#define PST_W 16
#define PST_REGISTERS 16
#include "cpu/pixel_kernels.inl"
PST_KERNELS;
#undef PST_W
#undef PST_REGISTERS
}  // namespace avx512
PST_TARGET_END
#endif

const PixelKernels& pixel_kernels() {
#if PST_X86
  if (isa() == Isa::avx512) return avx512::kKernels;
  if (isa() == Isa::avx2) return avx2::kKernels;
#endif
  return portable::kKernels;
}

}  // namespace pst
