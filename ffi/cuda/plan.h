// plan.h: what the plans share.
#pragma once

#include <optional>

#include "launch.h"

namespace jax_hadacore::cuda {

constexpr int Log2(int64_t n) {
  int bits = 0;
  while (n > 1) n /= 2, ++bits;
  return bits;
}

constexpr int64_t kReserved = 1024;  // bytes of shared memory that the hardware takes for each block

inline int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool Aligned(const void* x, const void* y) {
  return (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % 16 == 0;
}

inline bool Is16Bit(const Problem& problem) { return problem.dtype == Dtype::kF16 || problem.dtype == Dtype::kBF16; }

inline Work MakeWork(const void* x, void* y, int64_t count, int64_t n, int64_t stride, int64_t per_block,
                     double scale) {
  Work work{};
  work.x = x, work.y = y;
  work.count = count, work.n = n, work.stride = stride, work.per_block = per_block;
  work.scale = scale, work.float_scale = static_cast<float>(scale);
  work.words_before_signs = -1;
  return work;
}

// What a scale loses as a float.
inline float RestOfScale(double scale) {
  return static_cast<float>(scale - static_cast<double>(static_cast<float>(scale)));
}

// The launch of a kernel on rows of a power of two.
Launch OnRows(const Kernel& kernel, const void* x, void* y, int64_t rows, int64_t n, double scale, const Gpu& gpu);

// Gives a kernel the signs of a row's elements, if there are any, behind the words that it has already.
void AddSigns(Launch& launch, const Problem& p);

// Whether one pass serves rows whose length is no power of two, with so many bytes of shared memory to a block; and
// that pass (order_plan.cc).
bool OnePassOfOrders(const Problem& p, int64_t shared_bytes);
Launch OnOrders(const Problem& p, const Buffers& b, const Gpu& gpu);

// The launch that transforms such rows, of columns of 2^m elements, into codes on a ring; none where there is none.
std::optional<Launch> CodesOnRing(const Problem& p, Formats formats, const void* x, void* codes, const Gpu& gpu);

}  // namespace jax_hadacore::cuda
