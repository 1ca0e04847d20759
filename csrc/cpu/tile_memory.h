// Memory of tiled activations, kept from step to step: a fresh tensor of this size would be faulted in page by page, which
// costs as much as computing it (0.5 to 2 us a page of 4 KB)
#pragma once
#include "cpu/tensors.h"

namespace pst {

// As new_floats; large ones from memory that a freed tensor of that size left behind
Tensor new_tiles(const Tensor& like, std::vector<int64_t> size);

// Bytes of freed memory that are kept for the next tensor, 1 GiB at first; 0 frees what there is
void keep_tile_memory(int64_t bytes);

}  // namespace pst
