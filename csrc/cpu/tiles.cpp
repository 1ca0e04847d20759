#include "cpu/tiles.h"

#define PST_KERNELS                                                                                             \
  static const TileKernels kKernels = {kMaxRows, kMaxCols, rows,     weight_grad, reduce,    pack,              \
                                       unpack,   norm_act, norm_sums,   norm_grad, plane_sum}

namespace pst {

namespace portable {
#define PST_VL 4
#define PST_REGS 12
#include "cpu/tiles.inl"
#include "cpu/tiled_norm.inl"
PST_KERNELS;
#undef PST_VL
#undef PST_REGS
}  // namespace portable

#if PST_X86
PST_TARGET_BEGIN_AVX2
namespace avx2 {
#define PST_VL 8
#define PST_REGS 12
#include "cpu/tiles.inl"
#include "cpu/tiled_norm.inl"
PST_KERNELS;
#undef PST_VL
#undef PST_REGS
}  // namespace avx2
PST_TARGET_END

PST_TARGET_BEGIN_AVX512
namespace avx512 {
#define PST_VL 16
#define PST_REGS 16
#include "cpu/tiles.inl"
#include "cpu/tiled_norm.inl"
PST_KERNELS;
#undef PST_VL
#undef PST_REGS
}  // namespace avx512
PST_TARGET_END
#endif

const TileKernels& tile_kernels() {
#if PST_X86
  if (isa() == Isa::avx512) return avx512::kKernels;
  if (isa() == Isa::avx2) return avx2::kKernels;
#endif
  return portable::kKernels;
}

}  // namespace pst
