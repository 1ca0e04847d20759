// Independent multiply-adds in registers, for one instruction set
#include "cpu/vec.h"

constexpr int CHAINS = 12;  // latency 4 by 2 ports, and half as many to spare

static double chains(int64_t rounds) {
  V sums[CHAINS];
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) sums[i] = splat(float(i));
  const V x = splat(0.999f), y = splat(1e-3f);
  for (int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * x + y;
  }
  double total = 0;
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) total += sums[i][0];
  return total;
}
