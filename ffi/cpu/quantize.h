// quantize.h: float32 results to scales, zero points and codes, by the definition in docs/numerics.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../quantization.h"
#include "codes.h"
#include "vectors.h"

namespace jax_hadacore::cpu {
namespace {

// ---- What a scale is made of. ----

template <int h, int... i>
int32_t LargestLane(const Ints& v, std::integer_sequence<int, i...> lanes) {
  const Ints pairs = Max(v, __builtin_shufflevector(v, v, (i ^ h)...));
  if constexpr (h > 1) return LargestLane<h / 2>(pairs, lanes);
  return pairs[0];
}

// The largest of the keys of `count` numbers' bits, and of 0, which is the key of 0.
template <typename Key>
int32_t Largest(const float* w, int64_t count, const Key& key) {
  Ints most{};
  for (; count >= kFloatLanes; count -= kFloatLanes, w += kFloatLanes)
    most = Max(most, key(BitsOf(Native<float>::Load(w))));
  if (count > 0) {
    float last[kFloatLanes] = {};
    std::memcpy(last, w, static_cast<size_t>(count) * sizeof *w);
    most = Max(most, key(BitsOf(Native<float>::Load(last))));
  }
  return LargestLane<kFloatLanes / 2>(most, std::make_integer_sequence<int, kFloatLanes>{});
}

// NaN if any number is.
inline float LargestMagnitude(const float* w, int64_t count) {
  return BitCast<float>(Largest(w, count, [](const Ints& bits) { return bits & kMagnitude; }));
}

// A float's bits as an integer in the order of floats, with NaN at both ends; and back.
template <typename I>
I Ordered(const I& bits) {
  return bits ^ (bits >> 31 & kMagnitude);
}
// The largest number, or 0, and the least; one of them NaN if any number is.
inline float Highest(const float* w, int64_t count) {
  return BitCast<float>(Ordered(Largest(w, count, [](const Ints& bits) { return Ordered(bits); })));
}
inline float Lowest(const float* w, int64_t count) {
  return BitCast<float>(Ordered(~Largest(w, count, [](const Ints& bits) { return ~Ordered(bits); })));
}

// ---- The scales of as many groups as there are lanes. ----

struct Scales {
  Floats stored;   // or codes, in the low bits
  Floats inverse;  // what the groups' elements are multiplied by
};

// No scale is so small that its inverse is infinite.
inline Floats AtLeast(const Floats& scales) {
  constexpr float kLeast = 0x1p-126f;
  return scales < kLeast ? Floats{} + kLeast : scales;
}
inline Floats NanUnless(const Ints& finite, const Floats& v) { return finite ? v : FloatsOf(Ints{} + 0x7fc00000); }

inline Scales Float32Scales(const Floats& amax, float largest) {
  const Floats scales = amax == 0 ? Floats{} + 1 : AtLeast(amax / largest);
  return {scales, 1 / scales};
}

inline Scales E8M0Scales(const Floats& amax, int largest_exponent) {
  const Ints bits = BitsOf(amax), finite = bits < kInfinity;
  const Ints biased = bits == 0 ? Ints{} + 127 : Max((bits >> 23) - largest_exponent, Ints{});
  return {FloatsOf(finite ? biased : Ints{} + 255), NanUnless(finite, FloatsOf((254 - biased) << 23))};
}

// In units of the tensor's scale.
inline Scales E4M3Scales(const Floats& amax, float tensor) {
  constexpr int32_t kOne = 0x38, kNan = 0x7f;
  const Ints rounded = Float8E4M3(Code::kFloat8E4M3)(amax / (LargestCode(Code::kFloat4E2M1) * tensor));
  const Ints positive = (rounded & 0x7f) == 0 ? Ints{} + 1 : rounded;
  const Ints codes = BitsOf(amax) < kInfinity ? (amax == 0 ? Ints{} + kOne : positive) : Ints{} + kNan;
  // The exponent of a code is 120 less than a float's.
  const Floats values = FloatsOf((codes & 0x7f) << 20 | (codes & 0x80) << 24) * 0x1p120f;
  return {FloatsOf(codes), NanUnless((codes & 0x7f) != kNan, 1 / (values * tensor))};
}

struct ScalesAndZeros {
  Scales scales;
  Ints zeros;
};

inline ScalesAndZeros AsymmetricScales(const Floats& lowest, const Floats& highest) {
  const Floats scales = lowest == highest ? Floats{} + 1 : AtLeast((highest - lowest) / 15);
  const Ints finite = (BitsOf(scales) & kMagnitude) < kInfinity;
  const Floats inverse = NanUnless(finite, 1 / scales);
  return {{scales, inverse}, finite ? Nearest(-8 - lowest * inverse) : Ints{}};
}

// ---- A part of the results. ----

class Quantizer {
 public:
  Quantizer(const Quantization& quantization, const QuantizedBuffers& results)
      : quantization_(quantization), results_(results) {}

  // Of `count` results w, which are whole groups, or where the scale is given whole bytes of codes; `at` elements of
  // the array come before them. Overwrites w.
  void Quantize(float* w, int64_t count, int64_t at) const {
    if (quantization_.scale == Scale::kGiven) {
      const float inverse = 1 / *quantization_.given;
      ForCode(quantization_.code, [&](const auto& code) { Encode(w, count, inverse, code); });
      return Store(w, count, at);
    }
    const int64_t group = quantization_.group, groups = count / group;
    for (int64_t i = 0; i < groups; i += kTogether) {
      const int64_t some = std::min(groups - i, kTogether);
      float* from = w + i * group;
      if (quantization_.asymmetric) {
        Asymmetric(from, some, at / group + i);
      } else {
        Symmetric(from, some, at / group + i);
      }
      Store(from, some * group, at + i * group);
    }
  }

 private:
  static constexpr int64_t kTogether = 128;  // groups

  void Store(const float* codes, int64_t count, int64_t at) const {
    uint8_t* to = static_cast<uint8_t*>(results_.codes);
    if (CodeBits(quantization_.code) == 8) return StoreBytes(codes, count, to + at);
    StoreHalfBytes(codes, count, to + at / 2);
  }

  // For `groups` groups, of which `first` come before.
  void Symmetric(float* w, int64_t groups, int64_t first) const {
    const int64_t group = quantization_.group;
    float scales[kTogether] = {}, inverse[kTogether];
    for (int64_t i = 0; i < groups; ++i) scales[i] = LargestMagnitude(w + i * group, group);
    for (int64_t i = 0; i < groups; i += kFloatLanes) {
      const Scales made = MakeScales(Native<float>::Load(scales + i));
      Native<float>::Store(scales + i, made.stored);
      Native<float>::Store(inverse + i, made.inverse);
    }
    if (quantization_.scale == Scale::kFloat32) {
      StoreFloats(scales, groups, first);
    } else {
      StoreBytes(scales, groups, static_cast<uint8_t*>(results_.scales) + first);
    }
    ForCode(quantization_.code, [&](const auto& code) {
      for (int64_t i = 0; i < groups; ++i) Encode(w + i * group, group, inverse[i], code);
    });
  }

  Scales MakeScales(const Floats& amax) const {
    const Code code = quantization_.code;
    if (quantization_.scale == Scale::kFloat32) return Float32Scales(amax, LargestCode(code));
    if (quantization_.scale == Scale::kE8M0) return E8M0Scales(amax, LargestExponent(code));
    return E4M3Scales(amax, quantization_.given ? *quantization_.given : 1);
  }

  void Asymmetric(float* w, int64_t groups, int64_t first) const {
    const int64_t group = quantization_.group;
    float lowest[kTogether] = {}, highest[kTogether] = {}, inverse[kTogether];
    for (int64_t i = 0; i < groups; ++i) {
      lowest[i] = Lowest(w + i * group, group);
      highest[i] = Highest(w + i * group, group);
    }
    float *scales = lowest, *zeros = highest;  // take their places
    for (int64_t i = 0; i < groups; i += kFloatLanes) {
      const auto made = AsymmetricScales(Native<float>::Load(lowest + i), Native<float>::Load(highest + i));
      Native<float>::Store(scales + i, made.scales.stored);
      Native<float>::Store(inverse + i, made.scales.inverse);
      Native<float>::Store(zeros + i, FloatsOf(made.zeros));
    }
    StoreFloats(scales, groups, first);
    StoreBytes(zeros, groups, reinterpret_cast<uint8_t*>(results_.zero_points) + first);
    for (int64_t i = 0; i < groups; ++i)
      Encode(w + i * group, group, inverse[i], AsymmetricInt4(BitCast<int32_t>(zeros[i])));
  }

  void StoreFloats(const float* scales, int64_t groups, int64_t first) const {
    std::memcpy(static_cast<float*>(results_.scales) + first, scales, static_cast<size_t>(groups) * sizeof *scales);
  }

  const Quantization quantization_;
  const QuantizedBuffers results_;
};

}  // namespace
}  // namespace jax_hadacore::cpu
