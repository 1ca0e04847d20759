// Elements that are bfloat16 if `half`, else float
#pragma once
#include <cstdint>

namespace pst {

inline const void* bytes_at(const void* p, bool half, int64_t element) {
  return static_cast<const char*>(p) + element * (half ? 2 : 4);
}
inline void* bytes_at(void* p, bool half, int64_t element) { return static_cast<char*>(p) + element * (half ? 2 : 4); }

}  // namespace pst
