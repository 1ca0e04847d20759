// Compiles the file that PST_SOURCE names once per instruction set, in pst::portable, pst::avx2 and pst::avx512, with PST_W
// floats to a vector and PST_REGS vectors of sums, which leave the other registers to operands. PST_PICK picks one of the
// three. Everything that the file needs is included before.

namespace pst {

namespace portable {
#define PST_W 4
#define PST_REGS 12
#include PST_SOURCE
#undef PST_W
#undef PST_REGS
}  // namespace portable

#if PST_X86
PST_TARGET_BEGIN_AVX2
namespace avx2 {
#define PST_W 8
#define PST_REGS 12
#include PST_SOURCE
#undef PST_W
#undef PST_REGS
}  // namespace avx2
PST_TARGET_END

PST_TARGET_BEGIN_AVX512
namespace avx512 {
#define PST_W 16
#define PST_REGS 16
#include PST_SOURCE
#undef PST_W
#undef PST_REGS
}  // namespace avx512
PST_TARGET_END
#endif

}  // namespace pst
