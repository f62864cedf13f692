// plan.h: what the plans share.
#pragma once

#include "launch.h"

namespace jax_hadacore::cuda {

constexpr int Log2(int64_t n) {
  int bits = 0;
  while (n > 1) n /= 2, ++bits;
  return bits;
}

// The launch of a kernel on rows of a power of two.
Launch OnRows(const Kernel& kernel, const void* x, void* y, int64_t rows, int64_t n, double scale, const Gpu& gpu);

}  // namespace jax_hadacore::cuda
