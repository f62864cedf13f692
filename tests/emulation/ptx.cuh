// ptx.cuh: takes the place of ffi/cuda/ptx.cuh, whose assembly is not for the host; instructions.cc computes the same.
#pragma once

#include <cstdint>
#include <type_traits>

namespace emulation {

enum class Half { kF16, kBF16 };
uint32_t Pack(Half type, float low, float high);
uint32_t PackedFma(uint32_t a, uint32_t b, uint32_t c);
void MatrixMultiplyAdd(Half type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace emulation

namespace jax_hadacore::cuda {

struct F16 {};
struct BF16 {};

template <typename T>
constexpr emulation::Half kHalf = std::is_same_v<T, F16> ? emulation::Half::kF16 : emulation::Half::kBF16;

template <typename T>
uint32_t Pack(float low, float high) {
  return emulation::Pack(kHalf<T>, low, high);
}

inline uint32_t PackedFma(uint32_t a, uint32_t b, uint32_t c) { return emulation::PackedFma(a, b, c); }

template <typename T>
void MatrixMultiplyAdd(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MatrixMultiplyAdd(kHalf<T>, d, a, b0, b1);
}

}  // namespace jax_hadacore::cuda
