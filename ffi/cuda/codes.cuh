// codes.cuh: from float32 results to codes of 8 or 4 bits and the scales that groups of them share (quantization.h).
// Every product and quotient is rounded on its own, as in the definition (docs/numerics.md).
#pragma once

#include <cstdint>

#include "fragment.cuh"
#include "ptx.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

constexpr float kLeastScale = 0x1p-126f, kMostFloat = 0x1.fffffep127f;

// How far a group's values reach above and below 0: where codes are symmetric, both ways as `above`. NaN where a value
// is NaN.
struct Span {
  float above = 0, below = 0;

  template <int kCount>
  __device__ __forceinline__ void Include(const float (&values)[kCount], bool asymmetric) {
    if (asymmetric) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        above = MaxOrNan(above, values[i]);
        below = MaxOrNan(below, -values[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) above = MaxOrNan(above, fabsf(values[i]));
    }
  }

  __device__ __forceinline__ void Include(const Span& other) {
    above = MaxOrNan(above, other.above);
    below = MaxOrNan(below, other.below);
  }
};

// Of each span, all that `lanes` neighbouring lanes hold, a power of two of them.
template <int kCount>
__device__ __forceinline__ void IncludeLanes(Span (&spans)[kCount], int lanes, bool asymmetric) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (distance >= lanes) break;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      spans[i].above = MaxOrNan(spans[i].above, __shfl_xor_sync(kWarp, spans[i].above, distance));
    if (asymmetric)
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        spans[i].below = MaxOrNan(spans[i].below, __shfl_xor_sync(kWarp, spans[i].below, distance));
  }
}

// And of all lanes: magnitudes are ordered as their bits are, NaN last.
template <int kCount>
__device__ __forceinline__ void IncludeWarp(Span (&spans)[kCount], bool asymmetric) {
  const auto most = [](float v) { return __uint_as_float(__reduce_max_sync(kWarp, __float_as_uint(v))); };
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    spans[i].above = most(spans[i].above);
    if (asymmetric) spans[i].below = most(spans[i].below);
  }
}

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

// The low bytes of 2 or 4 words.
template <int kCount>
__device__ __forceinline__ uint32_t LowBytes(const uint32_t (&words)[kCount]) {
  const uint32_t first = __byte_perm(words[0], words[1], 0x0040);
  if constexpr (kCount == 4) return __byte_perm(first, __byte_perm(words[2], words[3], 0x0040), 0x5410);
  return first & 0xffff;
}
// The low halves of four bytes, as the bytes 0 and 2.
__device__ __forceinline__ uint32_t Nibbles(uint32_t bytes) { return (bytes & 0x000f000f) | (bytes >> 4 & 0x00f000f0); }

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

// Integer codes with a zero point; or with a given scale, where nothing else limits them or tells of NaN.
enum class Variant { kPlain, kAsymmetric, kGiven };

// Turns values into codes.
template <Code kCode, Variant kVariant>
struct Encoder {
  static constexpr int kBits = CodeBits(kCode);
  static constexpr bool kFloat8 = kCode == Code::kFloat8E4M3 || kCode == Code::kFloat8E5M2;

  // The codes of 2 or 4 values, one in each byte; of 4 bits in its low half.
  template <int kCount>
  static __device__ __forceinline__ uint32_t Bytes(const float (&values)[kCount], const Group& group) {
    float v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = __fmul_rn(values[i], group.inverse);
    if constexpr (kFloat8) {
      constexpr auto kPack = kCode == Code::kFloat8E4M3 ? PackE4M3 : PackE5M2;
      if constexpr (kCount == 4) return __byte_perm(kPack(v[0], v[1]), kPack(v[2], v[3]), 0x5410);
      return kPack(v[0], v[1]);
    } else {
      uint32_t words[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) words[i] = Word(v[i], group);
      return group.inverse == group.inverse ? LowBytes(words) : 0;
    }
  }

  // Stores the codes of kCount consecutive values, of which the first is the array's number `at`, a multiple of kCount.
  template <int kCount>
  static __device__ __forceinline__ void Store(void* codes, int64_t at, const float (&values)[kCount],
                                               const Group& group) {
    if constexpr (kCount == 8) {
      const float low[4] = {values[0], values[1], values[2], values[3]};
      const float high[4] = {values[4], values[5], values[6], values[7]};
      const uint32_t first = Bytes(low, group), second = Bytes(high, group);
      if constexpr (kBits == 8) {
        static_cast<uint2*>(codes)[at / 8] = make_uint2(first, second);
      } else {
        static_cast<uint32_t*>(codes)[at / 8] = __byte_perm(Nibbles(first), Nibbles(second), 0x6420);
      }
    } else {
      const uint32_t bytes = Bytes(values, group);
      if constexpr (kBits == 4) {
        const uint32_t nibbles = Nibbles(bytes);
        if constexpr (kCount == 4) {
          static_cast<uint16_t*>(codes)[at / 4] = static_cast<uint16_t>(__byte_perm(nibbles, 0, 0x4420));
        } else {
          static_cast<uint8_t*>(codes)[at / 2] = static_cast<uint8_t>(nibbles);
        }
      } else if constexpr (kCount == 4) {
        static_cast<uint32_t*>(codes)[at / 4] = bytes;
      } else {
        static_cast<uint16_t*>(codes)[at / 2] = static_cast<uint16_t>(bytes);
      }
    }
  }

 private:
  // The code in the low bits.
  static __device__ __forceinline__ uint32_t Word(float v, const Group& group) {
    if constexpr (kCode == Code::kFloat4E2M1) {
      const uint32_t sign = __float_as_uint(v) >> 28 & 8;
      return (CodeOfMagnitude<1, 0>(fminf(fabsf(v), LargestCode(kCode))) & ~8u) | sign;
    } else {
      if constexpr (kVariant == Variant::kAsymmetric) {
        v = fminf(fmaxf((v + kRuler) - kRuler + group.zero, -8), 7);
      } else if constexpr (kVariant == Variant::kGiven) {
        v = v == v ? fminf(fmaxf(v, -LargestCode(kCode)), LargestCode(kCode)) : 0;
      }
      return __float_as_uint(v + kRuler);
    }
  }
};

// The quantisation of a call, on the device.
class Quantizer {
 public:
  __device__ __forceinline__ explicit Quantizer(const Work& work)
      : work_(work), given_(work.given ? MaxOrNan(*work.given, kLeastScale) : 1.0f) {}

  __device__ __forceinline__ bool asymmetric() const { return work_.zero_points != nullptr; }

  // Finds what follows from groups' spans, and stores their scales: index(i) is a group's number in the array, and
  // stores(i) whether this thread is to store it.
  template <int kCount, typename Index, typename Stores>
  __device__ __forceinline__ void FindGroups(Group (&groups)[kCount], const Span (&spans)[kCount], const Index& index,
                                             const Stores& stores) const {
    const auto for_each = [&](const auto& find) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) find(groups[i], spans[i], index(i), stores(i));
    };
    switch (work_.scale_type) {
      case Scale::kFloat32:
        return for_each(
            [&](Group& group, const Span& span, int64_t at, bool stores) { FindFloat(group, span, at, stores); });
      case Scale::kE8M0:
        return for_each(
            [&](Group& group, const Span& span, int64_t at, bool stores) { FindPowerOfTwo(group, span, at, stores); });
      case Scale::kE4M3: {
        const float steps = 6 * given_, inverse_steps = Reciprocal(steps);
        return for_each([&](Group& group, const Span& span, int64_t at, bool stores) {
          FindE4M3(group, span, steps, inverse_steps, at, stores);
        });
      }
      default: {
        const float inverse = Reciprocal(given_);
        for_each([&](Group& group, const Span&, int64_t, bool) { group = {inverse, 0}; });
      }
    }
  }

  // Calls function(Encoder). kGiven: the scale may be given.
  template <bool kGiven, typename F>
  __device__ __forceinline__ void ForCode(const F& function) const {
    const bool given = kGiven && work_.scale_type == Scale::kGiven;
    switch (work_.code) {
      case Code::kFloat8E4M3: return function(Encoder<Code::kFloat8E4M3, Variant::kPlain>{});
      case Code::kFloat8E5M2: return function(Encoder<Code::kFloat8E5M2, Variant::kPlain>{});
      case Code::kFloat4E2M1: return function(Encoder<Code::kFloat4E2M1, Variant::kPlain>{});
      case Code::kInt4:
        if (asymmetric()) return function(Encoder<Code::kInt4, Variant::kAsymmetric>{});
        if constexpr (kGiven)
          if (given) return function(Encoder<Code::kInt4, Variant::kGiven>{});
        return function(Encoder<Code::kInt4, Variant::kPlain>{});
      default:
        if constexpr (kGiven)
          if (given) return function(Encoder<Code::kInt8, Variant::kGiven>{});
        return function(Encoder<Code::kInt8, Variant::kPlain>{});
    }
  }

 private:
  __device__ __forceinline__ void FindFloat(Group& group, const Span& span, int64_t at, bool stores) const {
    const float extent = span.above + span.below;
    const bool finite = extent <= kMostFloat;
    const float scale = extent == 0 ? 1 : MaxOrNan(Quotient(extent, work_.steps, work_.inverse_steps), kLeastScale);
    const float inverse = Reciprocal(scale);
    const bool integers = work_.code == Code::kInt8 || work_.code == Code::kInt4;
    group.inverse = finite ? inverse : integers ? __uint_as_float(0x7fffffffu) : ApproximateReciprocal(extent);
    group.zero = 0;
    if (asymmetric() && finite) group.zero = rintf(__fmul_rn(span.below, inverse) - 8);
    if (stores) {
      static_cast<float*>(work_.scales)[at] = finite ? scale : extent;
      if (asymmetric()) work_.zero_points[at] = static_cast<int8_t>(group.zero);
    }
  }

  __device__ __forceinline__ void FindPowerOfTwo(Group& group, const Span& span, int64_t at, bool stores) const {
    const int exponent = static_cast<int>(__float_as_uint(span.above) >> 23);
    const bool finite = exponent < 255;
    const int stored = span.above == 0 ? 127 : finite ? max(exponent - LargestExponent(work_.code), 0) : 255;
    if (stores) static_cast<uint8_t*>(work_.scales)[at] = static_cast<uint8_t>(stored);
    group = {__uint_as_float(finite ? static_cast<uint32_t>(254 - stored) << 23 : 0x7fffffffu), 0};
  }

  __device__ __forceinline__ void FindE4M3(Group& group, const Span& span, float steps, float inverse_steps, int64_t at,
                                           bool stores) const {
    uint32_t stored = PackE4M3(Quotient(span.above, steps, inverse_steps), 0) & 0xff;
    if (stored == 0) stored = span.above == 0 ? 0x38 : 1;
    if (!(span.above <= kMostFloat)) stored = 0x7f;
    if (stores) static_cast<uint8_t*>(work_.scales)[at] = static_cast<uint8_t>(stored);
    group = {Reciprocal(MaxOrNan(ValueOfE4M3(stored) * given_, kLeastScale)), 0};
  }

  const Work& work_;
  float given_;
};

// In place of an element type: results become codes, with a scale to each row or to each group of one.
template <bool kGroups_>
struct Quantized {
  static constexpr bool kGroups = kGroups_;
};
template <bool kGroups>
struct Element<Quantized<kGroups>> {
  using Storage = uint8_t;
};
template <typename Out>
constexpr bool kIsQuantized = std::is_same_v<Out, Quantized<false>> || std::is_same_v<Out, Quantized<true>>;

// In place of what a kernel without codes does not have.
struct Nothing {
  Nothing() = default;
  __device__ __forceinline__ explicit Nothing(const Work&) {}
};

// A thread's results of a row until its scales are known: of every set a vector of kWidth for each of the block's
// kCount warps, kDistance apart. Neighbouring threads hold neighbouring vectors.
template <int kSets, int kCount, int kWidth, int kDistance>
class KeptRow {
 public:
  __device__ __forceinline__ void Keep(int set, const float (&values)[kCount][kWidth], float scale) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values_[set * kCount + i][j] = values[i][j] * scale;
  }

  // The row has one scale. For all threads of a block, which has shared memory for a span of each warp. A set begins
  // at the array's element number at(set).
  template <typename At>
  __device__ __forceinline__ void StoreRow(const Quantizer& quantizer, const Work& work, int64_t row, Span* spans,
                                           const At& at) const {
    const int thread = static_cast<int>(threadIdx.x);
    const bool asymmetric = quantizer.asymmetric();
    Span span[1];
#pragma unroll
    for (const float (&v)[kWidth] : values_) span[0].Include(v, asymmetric);
    IncludeWarp(span, asymmetric);
    if (thread % 32 == 0) spans[thread / 32] = span[0];
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kCount; ++warp) span[0].Include(spans[warp]);
    Group group[1];
    quantizer.FindGroups(group, span, [&](int) { return row; }, [&](int) { return thread == 0; });
    quantizer.ForCode<true>([&](auto encoder) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        encoder.Store(work.y, at(i / kCount) + i % kCount * kDistance, values_[i], group[0]);
    });
  }

  // Every 2^group_bits elements have a scale, at most 32 vectors.
  template <typename At>
  __device__ __forceinline__ void StoreGroups(const Quantizer& quantizer, const Work& work, const At& at) const {
    constexpr int kTogether = 2;  // vectors, as many as there are registers for
    const int lanes = (1 << work.group_bits) / kWidth;
    const bool asymmetric = quantizer.asymmetric(), stores = (static_cast<int>(threadIdx.x) & (lanes - 1)) == 0;
#pragma unroll
    for (int begin = 0; begin < kVectors; begin += kTogether) {
      const auto place = [&](int i) { return at((begin + i) / kCount) + (begin + i) % kCount * kDistance; };
      Span span[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) span[i].Include(values_[begin + i], asymmetric);
      IncludeLanes(span, lanes, asymmetric);
      Group groups[kTogether];
      quantizer.FindGroups(
          groups, span, [&](int i) { return place(i) >> work.group_bits; }, [&](int) { return stores; });
      quantizer.ForCode<false>([&](auto encoder) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) encoder.Store(work.y, place(i), values_[begin + i], groups[i]);
      });
    }
  }

 private:
  static constexpr int kVectors = kSets * kCount;

  float values_[kVectors][kWidth];
};

}  // namespace jax_hadacore::cuda
