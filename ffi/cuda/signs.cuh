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

// Which bit of its word is element i's.
__device__ __forceinline__ int BitOf(unsigned i) { return static_cast<int>(i % 32 / 2 + i % 2 * 16); }

// 1 where element i is minus.
__device__ __forceinline__ uint32_t SignBit(const uint32_t* signs, unsigned i) { return signs[i / 32] >> BitOf(i) & 1; }

// The signs of a word's elements 2 pair and 2 pair + 1, where two packed 16-bit numbers have theirs.
__device__ __forceinline__ uint32_t PairSigns(uint32_t word, int pair) { return word << (15 - pair) & kAllSigns; }

// The signs of kCount consecutive elements, none by default: the last ones of a word, so that those of the last pair
// are where two packed 16-bit numbers have theirs.
template <int kCount>
struct PackedSigns {
  uint32_t word = 0;

  // Of a row's elements from `at` on, a multiple of kCount, in the word that has them.
  static __device__ __forceinline__ PackedSigns In(uint32_t word, unsigned at) {
    return {word << (16 - (kCount + 1) / 2 - at % 32 / 2)};
  }
  static __device__ __forceinline__ PackedSigns From(const uint32_t* signs, unsigned at) {
    if constexpr (kCount == 1) return {SignBit(signs, at) << 15};
    return In(signs[at / 32], at);
  }
  // The same in rows of 2^kBits elements one after the other; short ones are repeated.
  template <int kBits>
  static __device__ __forceinline__ PackedSigns FromRows(const uint32_t* signs, unsigned at) {
    if constexpr (kBits == 2) return In((*signs & 0x30003) * 0x5, 0);
    if constexpr (kBits == 1) return In((*signs & 0x10001) * 0xf, 0);
    if constexpr (kBits == 0) return In((*signs & 1) * 0xf000f, 0);
    return From(signs, at % (1 << kBits));
  }

  // Of elements 2 i and 2 i + 1, for packed numbers.
  __device__ __forceinline__ uint32_t Pair(int i) const { return PairSigns(word, 16 - (kCount + 1) / 2 + i); }
  // v with the sign of element i.
  __device__ __forceinline__ float Apply(float v, int i) const {
    return __uint_as_float(__float_as_uint(v) ^ (i % 2 ? Pair(i / 2) & 0x80000000u : Pair(i / 2) << 16));
  }
};

// Packed numbers of +-1 with those signs.
template <typename T>
__device__ __forceinline__ uint32_t SignedOnes(uint32_t signs) {
  constexpr uint32_t kOnes = std::is_same_v<T, F16> ? 0x3c003c00 : 0x3f803f80;
  return (signs & kAllSigns) ^ kOnes;
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
