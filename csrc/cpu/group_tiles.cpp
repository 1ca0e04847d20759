#include <utility>

#include "cpu/tiles.h"

#define PST_KERNELS static const GroupKernels kKernels = {kGroupRows, kGroupCols, group_rows, group_grad}

namespace pst {

namespace portable {
namespace groups {
#define PST_VL 4
#define PST_REGS 12
#include "cpu/group_tiles.inl"
PST_KERNELS;
#undef PST_VL
#undef PST_REGS
}  // namespace groups
}  // namespace portable

#if PST_X86
PST_TARGET_BEGIN_AVX2
namespace avx2 {
namespace groups {
#define PST_VL 8
#define PST_REGS 12
#include "cpu/group_tiles.inl"
PST_KERNELS;
#undef PST_VL
#undef PST_REGS
}  // namespace groups
}  // namespace avx2
PST_TARGET_END

PST_TARGET_BEGIN_AVX512
namespace avx512 {
namespace groups {
#define PST_VL 16
#define PST_REGS 16
#include "cpu/group_tiles.inl"
PST_KERNELS;
#undef PST_VL
#undef PST_REGS
}  // namespace groups
}  // namespace avx512
PST_TARGET_END
#endif

const GroupKernels& group_kernels() {
#if PST_X86
  if (isa() == Isa::avx512) return avx512::groups::kKernels;
  if (isa() == Isa::avx2) return avx2::groups::kKernels;
#endif
  return portable::groups::kKernels;
}

}  // namespace pst
