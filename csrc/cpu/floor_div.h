// Quotients rounded down and up, of negative numbers too
#pragma once
#include <cstdint>

namespace pst {

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

}  // namespace pst
