#include "cpu/pixel_kernels.h"

#include <cstring>
#include <utility>

#define PST_SOURCE "cpu/pixel_kernels.inl"
#include "cpu/each_isa.inl"

const pst::PixelKernels& pst::pixel_kernels() { return PST_PICK(kKernels); }
