#include "cpu/tiles.h"

#include <cstring>
#include <utility>

#define PST_SOURCE "cpu/tiles.inl"
#include "cpu/each_isa.inl"

const pst::TileKernels& pst::tile_kernels() { return PST_PICK(kKernels); }
