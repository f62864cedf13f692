// codes.cuh: from float32 results to codes of 8 or 4 bits and the scales that groups of them share (quantization.h).
#pragma once

#include <cstdint>

#include "fragment.cuh"
#include "ptx.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

constexpr float kLeastScale = 0x1p-126f;

// What a group's values span: its largest magnitude; or, where codes are asymmetric, from `low` <= 0 to `high`. NaN
// where a value is NaN.
struct Span {
  float high = 0, low = 0;

  template <int kCount>
  __device__ __forceinline__ void Include(const float (&values)[kCount], bool asymmetric) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) high = MaxOrNan(high, asymmetric ? values[i] : fabsf(values[i]));
    if (asymmetric)
#pragma unroll
      for (int i = 0; i < kCount; ++i) low = MinOrNan(low, values[i]);
  }

  __device__ __forceinline__ void Include(const Span& other, bool asymmetric) {
    high = MaxOrNan(high, other.high);
    if (asymmetric) low = MinOrNan(low, other.low);
  }

  // Of all that `lanes` neighbouring lanes hold, a power of two of them.
  __device__ __forceinline__ void IncludeLanes(int lanes, bool asymmetric) {
    constexpr unsigned kAll = 0xffffffffu;
    for (int distance = 1; distance < lanes; distance *= 2) {
      high = MaxOrNan(high, __shfl_xor_sync(kAll, high, distance));
      if (asymmetric) low = MinOrNan(low, __shfl_xor_sync(kAll, low, distance));
    }
  }
};

// The magnitude of a code with kMantissa bits of mantissa and normal numbers from 2^kLeastExponent on, of a value that
// is not NaN and not above the largest: added to a power of two whose last bit is worth as much as the code's, it is
// rounded to a whole number of those.
template <int kMantissa, int kLeastExponent>
__device__ __forceinline__ uint32_t CodeOfMagnitude(float magnitude) {
  constexpr uint32_t kLeast = static_cast<uint32_t>(kLeastExponent + 127) << 23;
  const uint32_t exponent = max(__float_as_uint(magnitude) & 0x7f800000u, kLeast);
  const uint32_t ruler = exponent + ((23 - kMantissa) << 23);
  return __float_as_uint(magnitude + __uint_as_float(ruler)) - ruler + ((exponent - kLeast) >> (23 - kMantissa));
}

// Two float8 numbers, the first in the low byte; what is too large becomes the largest, and NaN 0x7f.
template <int kMantissa, int kLeastExponent>
__device__ __forceinline__ uint32_t PackFloat8(float low, float high, float most) {
  const auto code = [&](float v) {
    const uint32_t magnitude = v == v ? CodeOfMagnitude<kMantissa, kLeastExponent>(fminf(fabsf(v), most)) : 0x7f;
    return magnitude | (__float_as_uint(v) >> 24 & 0x80);
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

// Scale and code of a call (quantization.h), and what follows for each group.
class Quantizer {
 public:
  __device__ __forceinline__ explicit Quantizer(const Work& work)
      : work_(work), given_(work.given ? *work.given : 1.0f) {}

  __device__ __forceinline__ bool asymmetric() const { return work_.zero_points != nullptr; }

  // What a group's values are multiplied by, and what is added to the codes.
  struct Group {
    float inverse;
    int zero;
    bool finite;
  };

  // The group number `group` of the array, whose values span that; `store`: the thread stores its scale.
  __device__ __forceinline__ Group FindGroup(const Span& span, int64_t group, bool store) const {
    const bool finite = span.high - span.low <= 0x1.fffffep127f;
    switch (work_.scale_type) {
      case Scale::kE8M0: {
        const uint32_t exponent = __float_as_uint(span.high) >> 23;
        const int stored =
            span.high == 0 ? 127 : max(static_cast<int>(max(exponent, 0u)) - LargestExponent(work_.code), 0);
        const uint32_t byte = finite ? static_cast<uint32_t>(stored) : 255u;
        if (store) static_cast<uint8_t*>(work_.scales)[group] = static_cast<uint8_t>(byte);
        return {finite ? __uint_as_float((254 - byte) << 23) : __uint_as_float(0x7fffffffu), 0, finite};
      }
      case Scale::kE4M3: {
        const float ratio = span.high / (6 * given_);
        uint32_t byte = PackE4M3(ratio, 0) & 0xff;
        if (byte == 0) byte = span.high == 0 ? 0x38 : 1;
        if (!finite) byte = 0x7f;
        if (store) static_cast<uint8_t*>(work_.scales)[group] = static_cast<uint8_t>(byte);
        return {1 / (ValueOfE4M3(byte) * given_), 0, finite};
      }
      case Scale::kGiven: return {1 / given_, 0, true};
      default: break;
    }
    const float extent = span.high - span.low;
    const float steps = asymmetric() ? 15.0f : LargestCode(work_.code);
    const float scale = extent == 0 ? 1 : MaxOrNan(extent / steps, kLeastScale);
    const float inverse = 1 / scale;
    int zero = 0;
    if (asymmetric() && finite) zero = static_cast<int>(rintf(-8 - span.low * inverse));
    if (store) {
      static_cast<float*>(work_.scales)[group] = scale;
      if (asymmetric()) work_.zero_points[group] = static_cast<int8_t>(zero);
    }
    return {inverse, zero, finite};
  }

  // The codes of 2 or 4 consecutive values, packed as they are stored.
  template <int kCount>
  __device__ __forceinline__ uint32_t Codes(const float (&values)[kCount], const Group& group) const {
    float v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = values[i] * group.inverse;
    uint32_t codes[kCount];
    switch (work_.code) {
      case Code::kFloat8E4M3: return Pairs(v, PackE4M3);
      case Code::kFloat8E5M2: return Pairs(v, PackE5M2);
      case Code::kFloat4E2M1:
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          codes[i] = CodeOfMagnitude<1, 0>(fminf(fabsf(v[i]), 6)) | (__float_as_uint(v[i]) >> 28 & 8);
        break;
      case Code::kInt4:
#pragma unroll
        for (int i = 0; i < kCount; ++i) codes[i] = Rounded(v[i], 7);
        if (asymmetric())
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            codes[i] = static_cast<uint32_t>(min(max(static_cast<int>(codes[i]) + group.zero, -8), 7));
#pragma unroll
        for (int i = 0; i < kCount; ++i) codes[i] &= 15;
        break;
      default:
#pragma unroll
        for (int i = 0; i < kCount; ++i) codes[i] = Rounded(v[i], 127);
        return group.finite ? FirstBytes(codes) : 0;
    }
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) packed |= codes[i] << 4 * i;
    return group.finite ? packed : 0;
  }

  // Stores the codes of kCount consecutive values of which the first is the array's number `at`, a multiple of kCount.
  template <int kCount>
  __device__ __forceinline__ void Store(uint32_t codes, int64_t at) const {
    const bool bytes = CodeBits(work_.code) == 8;
    if constexpr (kCount == 4) {
      if (bytes) {
        static_cast<uint32_t*>(work_.y)[at / 4] = codes;
      } else {
        static_cast<uint16_t*>(work_.y)[at / 4] = static_cast<uint16_t>(codes);
      }
    } else {
      if (bytes) {
        static_cast<uint16_t*>(work_.y)[at / 2] = static_cast<uint16_t>(codes);
      } else {
        static_cast<uint8_t*>(work_.y)[at / 2] = static_cast<uint8_t>(codes);
      }
    }
  }

  // And those of 8 consecutive ones.
  __device__ __forceinline__ void StorePair(uint32_t low, uint32_t high, int64_t at) const {
    if (CodeBits(work_.code) == 8) {
      static_cast<uint2*>(work_.y)[at / 8] = make_uint2(low, high);
    } else {
      static_cast<uint32_t*>(work_.y)[at / 8] = low | high << 16;
    }
  }

 private:
  static __device__ __forceinline__ float ValueOfE4M3(uint32_t byte) {
    // A float's exponent has one more bit and another bias; of subnormals, that is a subnormal float.
    return byte == 0x7f ? __uint_as_float(0x7fffffffu) : __uint_as_float(byte << 20) * 0x1p120f;
  }

  // The nearest integer, in the low bits. With a scale that is given nothing else limits it, or tells of a NaN.
  __device__ __forceinline__ uint32_t Rounded(float v, float most) const {
    constexpr float kRuler = 0x1.8p23f;
    if (work_.scale_type == Scale::kGiven) v = v == v ? fminf(fmaxf(v, -most), most) : 0;
    return __float_as_uint(v + kRuler) - __float_as_uint(kRuler);
  }

  template <int kCount, typename F>
  static __device__ __forceinline__ uint32_t Pairs(const float (&v)[kCount], const F& pack) {
    if constexpr (kCount == 4) return __byte_perm(pack(v[0], v[1]), pack(v[2], v[3]), 0x5410);
    return pack(v[0], v[1]);
  }

  template <int kCount>
  static __device__ __forceinline__ uint32_t FirstBytes(const uint32_t (&codes)[kCount]) {
    const uint32_t first = __byte_perm(codes[0], codes[1], 0x0040);
    if constexpr (kCount == 4) return __byte_perm(first, __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
    return first & 0xffff;
  }

  const Work& work_;
  float given_;
};

// In place of an element type: results become codes.
struct Quantized {};
template <>
struct Element<Quantized> {
  using Storage = uint8_t;
};

// In place of what a kernel without codes does not have.
struct Nothing {
  Nothing() = default;
  __device__ __forceinline__ explicit Nothing(const Work&) {}
};

// A thread's results of a row until its scale is known: of every set kCount vectors of kWidth, kDistance apart.
template <int kSets, int kCount, int kWidth, int kDistance>
class KeptRow {
 public:
  __device__ __forceinline__ void Keep(int set, const float (&values)[kCount][kWidth], int place, float scale) {
    places_[set] = place;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values_[set][i][j] = values[i][j] * scale;
  }

  // For all threads of a block, which has shared memory for a span of each warp. The row begins at the array's element
  // number `first`; neighbouring threads hold neighbouring vectors.
  __device__ __forceinline__ void Store(const Quantizer& quantizer, int64_t first, int row_bits, int group_bits,
                                        Span* spans) const {
    const bool asymmetric = quantizer.asymmetric();
    const int thread = static_cast<int>(threadIdx.x);
    if (group_bits == row_bits) {
      Span span;
      ForEach([&](const float (&v)[kWidth], int) { span.Include(v, asymmetric); });
      span.IncludeLanes(32, asymmetric);
      if (thread % 32 == 0) spans[thread / 32] = span;
      __syncthreads();
      const int warps = static_cast<int>(blockDim.x) / 32;
      for (int warp = 0; warp < warps; ++warp) span.Include(spans[warp], asymmetric);
      const Quantizer::Group group = quantizer.FindGroup(span, first >> row_bits, thread == 0);
      ForEach([&](const float (&v)[kWidth], int place) {
        quantizer.Store<kWidth>(quantizer.Codes(v, group), first + place);
      });
    } else {
      const int lanes = (1 << group_bits) / kWidth;
      ForEach([&](const float (&v)[kWidth], int place) {
        Span span;
        span.Include(v, asymmetric);
        span.IncludeLanes(lanes, asymmetric);
        const Quantizer::Group group = quantizer.FindGroup(span, (first + place) >> group_bits, thread % lanes == 0);
        quantizer.Store<kWidth>(quantizer.Codes(v, group), first + place);
      });
    }
  }

 private:
  template <typename F>
  __device__ __forceinline__ void ForEach(const F& function) const {
#pragma unroll
    for (int set = 0; set < kSets; ++set)
#pragma unroll
      for (int i = 0; i < kCount; ++i) function(values_[set][i], places_[set] + i * kDistance);
  }

  float values_[kSets][kCount][kWidth];
  int places_[kSets];
};

}  // namespace jax_hadacore::cuda
