#include "cpu/tiles.h"

#include <cstring>
#include <utility>

#define PST_SOURCE "cpu/group_tiles.inl"
#include "cpu/each_isa.inl"

const pst::GroupKernels& pst::group_kernels() { return PST_PICK(groups::kKernels); }
