// problem.h: what one call of the transform has to do. Knows neither XLA nor CUDA.
#pragma once

#include <cstdint>

namespace jax_hadacore {

constexpr int64_t kMaxLength = int64_t{1} << 24;

enum class Dtype { kF16, kBF16, kF32, kF64 };

// y[r] = scale * H_n x[r] for `rows` contiguous rows of n = 2^k elements; y == x is allowed.
struct Problem {
  Dtype dtype;
  int64_t n;
  int64_t rows;
  double scale;
};

}  // namespace jax_hadacore
