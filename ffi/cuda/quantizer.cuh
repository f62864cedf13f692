// quantizer.cuh: from float32 results to codes of 8 or 4 bits and the scales that groups of them share, for each format
// (quantization.h). Every product and quotient is rounded on its own, as in the definition (docs/numerics.md).
#pragma once

#include <cstdint>
#include <type_traits>

#include "fragment.cuh"
#include "ptx.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

constexpr float kLeastScale = 0x1p-126f, kMostFloat = 0x1.fffffep127f;

// How far a group's values reach above and below 0: where codes are symmetric, both ways as `above`. NaN where a value
// is NaN.
struct Span {
  float above = 0, below = 0;

  template <bool kAsymmetric>
  __device__ __forceinline__ void Include(const Span& other) {
    above = MaxOrNan(above, other.above);
    if (kAsymmetric) below = MaxOrNan(below, other.below);
  }
};

// Includes all that `lanes` neighbouring lanes hold, a power of two of them.
template <bool kAsymmetric>
__device__ __forceinline__ void IncludeLanes(Span& span, int lanes) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (distance >= lanes) break;
    span.Include<kAsymmetric>(
        {__shfl_xor_sync(kWarp, span.above, distance), kAsymmetric ? __shfl_xor_sync(kWarp, span.below, distance) : 0});
  }
}

// And all that any lane holds: as integers, since numbers from 0 on are ordered as their bits are, NaN last.
template <bool kAsymmetric>
__device__ __forceinline__ void IncludeWarp(Span& span) {
  const auto most = [](float v) { return __uint_as_float(__reduce_max_sync(kWarp, __float_as_uint(v))); };
  span.above = most(span.above);
  if (kAsymmetric) span.below = most(span.below);
}

// Two vectors of a lane each, of which `lanes` neighbouring lanes hold a group: the lower half of the lanes goes on
// with the groups of the first, the upper with those of the second.
struct Halves {
  int lanes;
  bool upper;

  __device__ __forceinline__ explicit Halves(int lanes) : lanes(lanes / 2), upper(Lane() & lanes / 2) {}

  // Of the two, the one that is a lane's own.
  template <typename T>
  __device__ __forceinline__ T Own(const T& first, const T& second) const {
    return upper ? second : first;
  }
  // The other half's value.
  __device__ __forceinline__ float Other(float own) const { return __shfl_xor_sync(kWarp, own, lanes); }
};

// What a group's values are multiplied by, and what is added to its codes. The first is NaN where the codes are 0 or
// NaN because a value is not finite.
struct Group {
  float inverse, zero;
};

// Rounds a float up to 2^22 to a multiple of its last bit's worth, 1, which is then in the low bits.
constexpr float kRuler = 0x1.8p23f;

// The code of a magnitude, which has kMantissa bits of mantissa and normal numbers from 2^kLeastExponent on, in the low
// bits; the magnitude is at most the largest. As above, with a ruler for each exponent.
template <int kMantissa, int kLeastExponent>
__device__ __forceinline__ uint32_t CodeOfMagnitude(float magnitude) {
  constexpr uint32_t kLeast = static_cast<uint32_t>(kLeastExponent + 127) << 23;
  // What the exponents add to the code, less that of the least: a multiple of 2, so that ties still go to even.
  constexpr uint32_t kRest = (0u - (kLeast >> (23 - kMantissa))) & 0xff;
  const uint32_t exponent = max(__float_as_uint(magnitude) & 0x7f800000u, kLeast);
  const uint32_t ruler = exponent + ((23 - kMantissa) << 23) + kRest;
  return __float_as_uint(magnitude + __uint_as_float(ruler)) + (exponent >> (23 - kMantissa));
}

// Two float8 numbers, the first in the low byte; what is too large becomes the largest, and NaN 0x7f.
template <int kMantissa, int kLeastExponent>
__device__ __forceinline__ uint32_t PackFloat8(float low, float high, float most) {
  const auto code = [&](float v) {
    const uint32_t magnitude = v == v ? CodeOfMagnitude<kMantissa, kLeastExponent>(fminf(fabsf(v), most)) : 0x7f;
    return (magnitude & 0x7f) | (__float_as_uint(v) >> 24 & 0x80);
  };
  return code(low) | code(high) << 8;
}
__device__ __forceinline__ uint32_t PackE4M3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return PackFloat8<3, -6>(low, high, LargestCode(Code::kFloat8E4M3));
#else
  return ConvertToE4M3(low, high);
#endif
}
__device__ __forceinline__ uint32_t PackE5M2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return PackFloat8<2, -14>(low, high, LargestCode(Code::kFloat8E5M2));
#else
  return ConvertToE5M2(low, high);
#endif
}

__device__ __forceinline__ float ValueOfE4M3(uint32_t byte) {
  // A float's exponent has one more bit and another bias; of subnormals, that is a subnormal float.
  return byte == 0x7f ? __uint_as_float(0x7fffffffu) : __uint_as_float(byte << 20) * 0x1p120f;
}

// Rounded once, as long as results are normal numbers: the remainders are exact (Markstein, IA-64 and Elementary
// Functions, 2000).
__device__ __forceinline__ float Reciprocal(float v) {
  const float about = ApproximateReciprocal(v);
  return fmaf(about, fmaf(-v, about, 1.0f), about);
}
__device__ __forceinline__ float Quotient(float a, float b, float reciprocal) {
  const float about = __fmul_rn(a, reciprocal);
  return fmaf(fmaf(-about, b, a), reciprocal, about);
}

// A lane's consecutive results as they are kept until the scale of their group is known: scaled; of codes of 4 bits
// that are no integers the magnitudes, and in the nibbles' highest bits the signs.
template <int kCount>
struct Results {
  float values[kCount];
  uint32_t signs;
};

template <auto value>
using Constant = std::integral_constant<decltype(value), value>;

// How results become codes, for one of the formats that there are.
template <Code kCode, Scale kScale, bool kAsymmetric = false>
class Quantizer {
 public:
  __device__ __forceinline__ explicit Quantizer(const Work& work) : work_(work) {
    if constexpr (kGiven || kScale == Scale::kE4M3) given_ = work.given ? MaxOrNan(*work.given, kLeastScale) : 1.0f;
  }

  // Scales a transform's sums, and finds how far they reach.
  template <int kCount>
  __device__ __forceinline__ Span Keep(Results<kCount>& results, const float (&sums)[kCount]) const {
    float (&v)[kCount] = results.values;
    results.signs = 0;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) {
      v[i] = __fmul_rn(kFloat4 ? fabsf(sums[i]) : sums[i], kFloat4 ? fabsf(work_.float_scale) : work_.float_scale);
      if (kFloat4) results.signs = __funnelshift_l(__float_as_uint(sums[i]), results.signs, 4);
    }
    if (kFloat4 && work_.float_scale < 0) results.signs ^= kSignsOfNibbles;
    Span span;
    if constexpr (kFloat4) {  // magnitudes are ordered as their bits are, NaN last
      uint32_t most = 0;
#pragma unroll
      for (const float value : v) most = max(most, __float_as_uint(value));
      span.above = __uint_as_float(most);
    } else if constexpr (kAsymmetric) {  // so are those from 0 on, and as unsigned integers those below 0, less first
      int above = 0;
      uint32_t below = 0;
#pragma unroll
      for (const float value : v)
        above = max(above, static_cast<int>(__float_as_uint(value))), below = max(below, __float_as_uint(value));
      span.above = __uint_as_float(above);
      span.below = below & kSign ? __uint_as_float(below ^ kSign) : 0;
    } else {
      span.above = fabsf(v[0]);
#pragma unroll
      for (int i = 1; i < kCount; ++i) span.above = MaxOrNan(span.above, fabsf(v[i]));
    }
    return span;
  }

  // Finds the span of two, and of all lanes' spans.
  static __device__ __forceinline__ void Include(Span& span, const Span& other) { span.Include<kAsymmetric>(other); }
  static __device__ __forceinline__ void IncludeAll(Span& span) { IncludeWarp<kAsymmetric>(span); }

  // Finds what follows from groups' spans, and stores their scales: index(i) is a group's number in the array, and
  // stores(i) whether this thread is to store it.
  template <int kCount, typename Index, typename Stores>
  __device__ __forceinline__ void FindGroups(Group (&groups)[kCount], const Span (&spans)[kCount], const Index& index,
                                             const Stores& stores) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) groups[i] = FindGroup(spans[i], index(i), stores(i));
  }

  // The same for vectors of which `lanes` neighbouring lanes hold a group together: of every two, half of the lanes
  // goes on with the group of the first, and half with that of the second.
  template <int kCount, typename Index, typename Stores>
  __device__ __forceinline__ void FindGroupsOfLanes(Group (&groups)[kCount], Span (&spans)[kCount], int lanes,
                                                    const Index& index, const Stores& stores) const {
    if constexpr (kCount == 1) {
      IncludeLanes<kAsymmetric>(spans[0], lanes);
      const bool first_lane = (Lane() & (lanes - 1)) == 0;
      FindGroups(groups, spans, index, [&](int i) { return first_lane && stores(i); });
    } else {
      const Halves halves(lanes);
      const auto own_of = [&](int i) { return 2 * i + halves.upper; };
      Span own[kCount / 2];
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const Span &a = spans[2 * i], &b = spans[2 * i + 1];
        own[i] = {halves.Own(a.above, b.above), halves.Own(a.below, b.below)};
        Include(own[i], {halves.Other(halves.Own(b.above, a.above)),
                         kAsymmetric ? halves.Other(halves.Own(b.below, a.below)) : 0});
      }
      Group found[kCount / 2];
      const auto own_index = [&](int i) { return index(own_of(i)); };
      const auto own_stores = [&](int i) { return stores(own_of(i)); };
      if (kCount > 2 && halves.lanes == 1) {
        FindGroups(found, own, own_index, own_stores);
      } else {
        FindGroupsOfLanes(found, own, halves.lanes, own_index, own_stores);
      }
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const Group mine = found[i], other = {halves.Other(mine.inverse), kAsymmetric ? halves.Other(mine.zero) : 0};
        groups[2 * i] = {halves.Own(mine.inverse, other.inverse), halves.Own(mine.zero, other.zero)};
        groups[2 * i + 1] = {halves.Own(other.inverse, mine.inverse), halves.Own(other.zero, mine.zero)};
      }
    }
  }

  // Where the codes of so many results end in memory, or of the array's first so many.
  static constexpr int Bytes(int results) { return results * CodeBits(kCode) / 8; }
  __device__ __forceinline__ uint8_t* Codes(int64_t first) const {
    return static_cast<uint8_t*>(work_.y) + (first * CodeBits(kCode) >> 3);
  }

  // Stores the codes of consecutive results at an address aligned to their size.
  template <int kCount>
  static __device__ __forceinline__ void Store(uint8_t* to, const Results<kCount>& results, const Group& group) {
    const float (&v)[kCount] = results.values;
    if constexpr (kCount == 8 && CodeBits(kCode) == 8) {
      const float low[4] = {v[0], v[1], v[2], v[3]}, high[4] = {v[4], v[5], v[6], v[7]};
      StoreWords(to, EightBits(low, group), EightBits(high, group));
    } else {
      StoreWord<Bytes(kCount)>(to, Word(results, group));
    }
  }

  // The codes of consecutive results, in the low bits.
  template <int kCount>
  static __device__ __forceinline__ uint32_t Word(const Results<kCount>& results, const Group& group) {
    if constexpr (kFloat4) {
      return Float4(results, group);
    } else if constexpr (kAsymmetric) {
      return Int4WithZero(results.values, group);
    } else if constexpr (kCode == Code::kInt4) {
      return Int4(results.values, group);
    } else {
      return EightBits(results.values, group);
    }
  }

 private:
  static constexpr bool kFloat4 = kCode == Code::kFloat4E2M1, kGiven = kScale == Scale::kGiven;
  static constexpr bool kIntegers = kCode == Code::kInt8 || kCode == Code::kInt4;
  static constexpr uint32_t kNan = 0x7fffffff, kSign = 0x80000000, kSignsOfNibbles = 0x88888888;

  __device__ __forceinline__ Group FindGroup(const Span& span, int64_t at, bool stores) const {
    if constexpr (kGiven) {
      return {Reciprocal(given_), 0};
    } else if constexpr (kScale == Scale::kFloat32) {
      return FindFloat(span, at, stores);
    } else if constexpr (kScale == Scale::kE8M0) {
      return FindPowerOfTwo(span, at, stores);
    } else {
      return FindE4M3(span, at, stores);
    }
  }

  __device__ __forceinline__ Group FindFloat(const Span& span, int64_t at, bool stores) const {
    const float extent = span.above + span.below;
    const bool finite = extent <= kMostFloat;
    const float scale = extent == 0 ? 1 : MaxOrNan(Quotient(extent, work_.steps, work_.inverse_steps), kLeastScale);
    const float inverse = Reciprocal(scale);
    Group group = {finite ? inverse : kIntegers ? __uint_as_float(kNan) : ApproximateReciprocal(extent), 0};
    if (kAsymmetric && finite) group.zero = rintf(__fmul_rn(span.below, inverse) - 8);
    if (stores) {
      static_cast<float*>(work_.scales)[at] = finite ? scale : extent;
      if (kAsymmetric) work_.zero_points[at] = static_cast<int8_t>(group.zero);
    }
    return group;
  }

  __device__ __forceinline__ Group FindPowerOfTwo(const Span& span, int64_t at, bool stores) const {
    const int exponent = static_cast<int>(__float_as_uint(span.above) >> 23);
    const bool finite = exponent < 255;
    const int stored = span.above == 0 ? 127 : finite ? max(exponent - LargestExponent(kCode), 0) : 255;
    if (stores) static_cast<uint8_t*>(work_.scales)[at] = static_cast<uint8_t>(stored);
    return {__uint_as_float(finite ? static_cast<uint32_t>(254 - stored) << 23 : kNan), 0};
  }

  __device__ __forceinline__ Group FindE4M3(const Span& span, int64_t at, bool stores) const {
    const float steps = 6 * given_, quotient = Quotient(span.above, steps, Reciprocal(steps));  // NaN of an infinity
    const uint32_t stored = span.above == 0 ? 0x38 : PackE4M3(MaxOrNan(quotient, 0x1p-9f), 0) & 0xff;
    if (stores) static_cast<uint8_t*>(work_.scales)[at] = static_cast<uint8_t>(stored);
    return {Reciprocal(MaxOrNan(ValueOfE4M3(stored) * given_, kLeastScale)), 0};
  }

  template <int kBytes>
  static __device__ __forceinline__ void StoreWord(uint8_t* to, uint32_t word) {
    using Word = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
    *reinterpret_cast<Word*>(to) = static_cast<Word>(word);
  }

  // Codes of 8 bits, and integers of 4 in as many, of 1, 2 or 4 values.
  template <int kCount>
  static __device__ __forceinline__ uint32_t EightBits(const float (&values)[kCount], const Group& group) {
    float v[Max(kCount, 2)] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = Limited(__fmul_rn(values[i], group.inverse));
    if constexpr (kIntegers) {
      if constexpr (kCount == 4) return PackInt8(v[0], v[1], PackInt8(v[2], v[3]));
      return PackInt8(v[0], v[1]);
    } else {
      constexpr auto kPack = kCode == Code::kFloat8E4M3 ? PackE4M3 : PackE5M2;
      if constexpr (kCount == 4) return kPack(v[0], v[1]) | kPack(v[2], v[3]) << 16;
      return kPack(v[0], v[1]);
    }
  }

  // What is left is to be rounded, and NaN to become 0 where codes are integers.
  static __device__ __forceinline__ float Limited(float v) {
    constexpr float kMost = LargestCode(kCode);
    return kIntegers && kGiven ? MaxOrNan(-MaxOrNan(-v, -kMost), -kMost) : v;
  }

  template <int kCount>
  static __device__ __forceinline__ uint32_t Int4(const float (&values)[kCount], const Group& group) {
    float even[kCount / 2], odd[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) even[i] = values[2 * i], odd[i] = values[2 * i + 1];
    return (EightBits(even, group) & 0x0f0f0f0f) | (EightBits(odd, group) << 4 & 0xf0f0f0f0);
  }

  // Codes with a zero point: as multiples of 1 from -8 on, between 0 and 15, which differ from the codes in their
  // highest bit.
  template <int kCount>
  static __device__ __forceinline__ uint32_t Int4WithZero(const float (&values)[kCount], const Group& group) {
    const auto rounded = [](float v) { return static_cast<int>(__float_as_uint(v + kRuler)); };
    constexpr int kZero = static_cast<int>(0x4b400000);  // rounded(0)
    const int least = rounded(group.zero) - kZero + 8 - kZero;
    uint32_t word = 0;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i)
      word = word * 16 + max(min(rounded(__fmul_rn(values[i], group.inverse)) + least, 15), 0);
    return group.inverse == group.inverse ? word ^ kSignsOfNibbles >> (32 - 4 * kCount) : 0;
  }

  // Codes of magnitudes: multiples of 1/2 up to 2, of 1 up to 4 and of 2 beyond. A sum with 2^23 - 2 is rounded to
  // multiples of 1/2 up to 2^23 and of 1 beyond, so it serves a magnitude up to 4; a sum of half of it with 2^23 serves
  // from there on. In their bits, which go up by 1 from code to code, the lesser is right.
  template <int kCount>
  static __device__ __forceinline__ uint32_t Float4(const Results<kCount>& results, const Group& group) {
    constexpr uint32_t kOnes = 0x11111111u >> (32 - 4 * kCount), kZero = 0x4b000000 - 4;  // 2^23 is the code 4
    // The product with a power of two is exact, and becomes a part of the sum.
    constexpr bool kExact = kScale == Scale::kE8M0;
    uint32_t magnitudes = 0;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) {
      const float v = kExact ? results.values[i] : __fmul_rn(results.values[i], group.inverse);
      const float slope = kExact ? group.inverse : 1;
      const uint32_t of_less = __float_as_uint(fmaf(v, slope, 0x1p23f - 2)),
                     of_more = __float_as_uint(fmaf(v, 0.5f * slope, 0x1p23f));
      magnitudes = magnitudes * 16 + min(min(of_less, of_more), kZero + 7);
    }
    const uint32_t codes = (magnitudes - kZero * kOnes) | (results.signs & kSignsOfNibbles);
    return group.inverse == group.inverse ? codes : 0;
  }

  const Work& work_;
  float given_ = 1;
};

}  // namespace jax_hadacore::cuda
