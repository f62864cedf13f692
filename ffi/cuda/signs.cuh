// signs.cuh: reads packed signs (problem.h), and applies them.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "ptx.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

constexpr uint32_t kAllSigns = 0x80008000u;  // of two packed 16-bit elements

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

// v with the sign of a word's element i.
__device__ __forceinline__ float ApplySign(float v, uint32_t word, int i) {
  const uint32_t pair = PairSigns(word, i / 2);
  return __uint_as_float(__float_as_uint(v) ^ (i % 2 ? pair & 0x80000000u : pair << 16));
}

// Packed numbers of +-1 with those signs.
template <typename T>
__device__ __forceinline__ uint32_t SignedOnes(uint32_t signs) {
  constexpr uint32_t kOnes = std::is_same_v<T, F16> ? 0x3c003c00 : 0x3f803f80;
  return (signs & kAllSigns) ^ kOnes;
}

// A word that begins with the signs of elements from an even one on, as far as their word goes, in rows of 2^kBits
// elements one after the other. Rows of less than 8 are repeated for the 8 elements from a row's first on.
template <int kBits>
__device__ __forceinline__ uint32_t SignsFrom(const uint32_t* signs, int element) {
  const int at = element % (1 << kBits);
  const uint32_t word = signs[at / 32] >> (at % 32 / 2);
  if constexpr (kBits == 2) return (word & 0x30003) * 0x5;
  if constexpr (kBits == 1) return (word & 0x10001) * 0xf;
  if constexpr (kBits == 0) return (word & 1) * 0xf000f;
  return word;
}

// What a kernel is given that applies signs to rows of 2^kBits elements.
template <int kBits>
using WorkAndSigns = WorkAndWords<static_cast<int>(SignWords(1 << kBits))>;

// The signs of a row's elements, which such a kernel always has. The compiler looks for them anew at each use, as
// registers are short, and cannot tell that they may be its parameter (Generic in ptx.cuh).
__device__ __forceinline__ const uint32_t* RowSigns(const Work& work, const uint32_t* words) {
  const uint32_t* signs = work.device_signs ? work.device_signs : words;
  KeepOutOfRegisters(signs);
  return signs;
}

}  // namespace jax_hadacore::cuda
