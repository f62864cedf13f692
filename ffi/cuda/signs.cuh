// signs.cuh: reads packed signs (problem.h).
#pragma once

#include <cstdint>

#include "../problem.h"
#include "fragment.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

// The signs of a row's elements, or null.
__device__ __forceinline__ const uint32_t* SignsOf(const Work& work, const uint32_t* words) {
  if (work.words_before_signs < 0) return nullptr;
  return work.device_signs ? work.device_signs : Generic(words) + work.words_before_signs;
}

// 1 where element i is minus.
__device__ __forceinline__ uint32_t SignBit(const uint32_t* signs, int i) {
  return signs[i / 32] >> (i % 32 / 2 + i % 2 * 16) & 1;
}

// The signs of a word's elements 2 pair and 2 pair + 1, where two packed 16-bit numbers have theirs.
__device__ __forceinline__ uint32_t PairSigns(uint32_t word, int pair) { return word << (15 - pair) & kAllSigns; }

// Packed numbers of +-1 with those signs.
template <typename T>
__device__ __forceinline__ uint32_t SignedOnes(uint32_t signs) {
  constexpr uint32_t kOnes = std::is_same_v<T, F16> ? 0x3c003c00 : 0x3f803f80;
  return (signs & kAllSigns) ^ kOnes;
}

}  // namespace jax_hadacore::cuda
