// problem.h: what one call of the transform has to do. Knows neither XLA nor CUDA.
#pragma once

#include <cstdint>

namespace jax_hadacore {

constexpr int64_t kMaxLength = int64_t{1} << 24;
constexpr int64_t kMaxOrder = 1024;

enum class Dtype { kF16, kBF16, kF32, kF64 };

// Signs are packed in words of 32: of each pair of elements 2 i and 2 i + 1 the signs are 16 bits apart, in bits i and
// 16 + i; 1 is minus. So one shift brings both to where the signs of two packed 16-bit numbers are.
constexpr int64_t SignWords(int64_t count) { return (count + 31) / 32; }

// A matrix of order k that is no power of two: k rows of SignWords(k) words; or, where its entries are not +-1, k * k
// values.
struct Factor {
  int64_t order;
  const uint32_t* signs;
  const double* values;
};

// y[r] = scale * (F_0 (x) F_1 (x) H_{2^m}) x[r] for `rows` rows of n elements, n the product of the orders and 2^m, the
// slowest index first; y == x is allowed.
struct Problem {
  Dtype dtype;
  int64_t n;
  int64_t rows;
  double scale;
  int factor_count = 0;
  Factor factors[2] = {};
  // Of n elements, which are multiplied before the transform, or after it; null for none.
  const uint32_t* signs = nullptr;
  bool signs_last = false;
  bool signs_on_device = false;  // in the memory that x is in, and not the host's
  // 1 where rows are contiguous; else they are the columns of (n, stride) tiles, for those who take these (launch.h).
  int64_t stride = 1;
};

// What is left of n for H: 2^m.
constexpr int64_t PowerOfTwo(const Problem& problem) {
  int64_t power = problem.n;
  for (int i = 0; i < problem.factor_count; ++i) power /= problem.factors[i].order;
  return power;
}

}  // namespace jax_hadacore
