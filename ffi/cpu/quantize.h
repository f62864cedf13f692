// quantize.h: float32 results to scales and codes of 8 or 4 bits, by the definition in docs/numerics.md.
//
// What is done for each element or group is written without branches, and compares bits as integers, where NaN is above
// infinity, so that the compiler can vectorise the loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../quantization.h"
#include "vectors.h"

namespace jax_hadacore::cpu {
namespace {

constexpr int32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;
constexpr float kLeastScale = 0x1p-126f;

inline int32_t BitsOf(float value) { return BitCast<int32_t>(value); }
inline float FloatOf(int32_t bits) { return BitCast<float>(bits); }
inline float NotANumber() { return FloatOf(kInfinity | 1 << 22); }

// ---- Codes: of a product w * inv, in the low bits. ----

// A sign, an exponent, of which kLeast is the least of a normal number, and kMantissa bits.
template <int kCodeBits, int kMantissa, int kLeast, int32_t kNan>
struct FloatCode {
  static constexpr int kBits = kCodeBits;
  static constexpr int kShift = 23 - kMantissa;
  int32_t largest;  // a float's bits

  int32_t operator()(float product) const {
    const int32_t bits = BitsOf(product), magnitude = bits & kMagnitude;
    const int32_t code = Round(std::min(magnitude, largest)) | (bits >> (32 - kBits) & 1 << (kBits - 1));
    return magnitude > kInfinity ? kNan : code;
  }

  // A sum with a power of two, whose unit in the last place is that of the code, is rounded as the code is, and counts
  // these units. A carry into the exponent is as it should be.
  static int32_t Round(int32_t magnitude) {
    constexpr int32_t kLeastBits = (127 + kLeast) << 23;
    const int32_t exponent = std::max(magnitude & kInfinity, kLeastBits), power = exponent + (kShift << 23);
    return BitsOf(FloatOf(magnitude) + FloatOf(power)) - power + ((exponent - kLeastBits) >> kShift);
  }
};
using Float8E4M3 = FloatCode<8, 3, -6, 0x7f>;
using Float8E5M2 = FloatCode<8, 2, -14, 0x7e>;
using Float4E2M1 = FloatCode<4, 1, 0, 0>;

// To the nearest integer, ties to even, of a magnitude below 2^22: the unit in the last place of this sum is one.
inline int32_t Nearest(float value) {
  constexpr float kUnits = 0x1.8p23f;
  return BitsOf(value + kUnits) - BitsOf(kUnits);
}

template <int kCodeBits>
struct IntCode {
  static constexpr int kBits = kCodeBits;
  int32_t largest;

  int32_t operator()(float product) const {
    const int32_t bits = BitsOf(product), magnitude = bits & kMagnitude;
    const int32_t code = Nearest(FloatOf(std::min(magnitude, largest) | (bits & ~kMagnitude)));
    return magnitude > kInfinity ? 0 : code;
  }
};

struct AsymmetricInt4 {
  static constexpr int kBits = 4;
  int32_t zero;

  int32_t operator()(float product) const {
    const int32_t code = std::min(std::max(Nearest(product) + zero, -8), 7);
    return (BitsOf(product) & kMagnitude) > kInfinity ? 0 : code;
  }
};

constexpr int kStripOfCodes = 16;

template <typename Code>
void EncodeStrip(const float* w, float inverse, Code code, uint8_t* to) {
  uint8_t codes[kStripOfCodes];
  for (int i = 0; i < kStripOfCodes; ++i) codes[i] = static_cast<uint8_t>(code(w[i] * inverse));
  if constexpr (Code::kBits == 8) {
    std::memcpy(to, codes, sizeof codes);
  } else {
    for (int i = 0; i < kStripOfCodes / 2; ++i)
      to[i] = static_cast<uint8_t>((codes[2 * i] & 0xf) | codes[2 * i + 1] << 4);
  }
}

// The codes of `count` elements, an even number where two share a byte.
template <typename Code>
void Encode(const float* w, int64_t count, float inverse, Code code, uint8_t* to) {
  constexpr int kBytes = kStripOfCodes * Code::kBits / 8;
  for (; count >= kStripOfCodes; count -= kStripOfCodes, w += kStripOfCodes, to += kBytes)
    EncodeStrip(w, inverse, code, to);
  if (count == 0) return;
  float last[kStripOfCodes] = {};
  uint8_t codes[kBytes];
  std::memcpy(last, w, static_cast<size_t>(count) * sizeof *w);
  EncodeStrip(last, inverse, code, codes);
  std::memcpy(to, codes, static_cast<size_t>(count * Code::kBits / 8));
}

// ---- Scales: each function stores that of a group and returns what its elements are multiplied by. ----

inline float ScaleOfFloat32(float amax, float largest, float* scale) {
  const float s = amax / largest;
  *scale = amax == 0 ? 1 : s < kLeastScale ? kLeastScale : s;
  return 1 / *scale;
}

inline float ScaleOfE8M0(float amax, int largest_exponent, uint8_t* scale) {
  const int32_t bits = BitsOf(amax), least = std::max((bits >> 23) - largest_exponent, 0);
  const int32_t biased = bits == 0 ? 127 : least;
  *scale = static_cast<uint8_t>(bits < kInfinity ? biased : 255);
  return bits < kInfinity ? FloatOf((254 - biased) << 23) : NotANumber();
}

// In units of the tensor's scale.
inline float ScaleOfE4M3(float amax, float tensor, uint8_t* scale) {
  constexpr int32_t kOne = 0x38, kNan = 0x7f;
  const int32_t code =
      Float8E4M3{BitsOf(LargestCode(Code::kFloat8E4M3))}(amax / (LargestCode(Code::kFloat4E2M1) * tensor));
  const int32_t not_zero = code & 0x7f ? code : 1, of_finite = amax == 0 ? kOne : not_zero;
  const int32_t stored = BitsOf(amax) < kInfinity ? of_finite : kNan;
  *scale = static_cast<uint8_t>(stored);
  // The exponent of a code is 120 less than a float's.
  const float value = FloatOf((stored & 0x7f) << 20 | (stored & 0x80) << 24) * 0x1p120f;
  return (stored & 0x7f) == kNan ? NotANumber() : 1 / (value * tensor);
}

inline float ScaleAndZero(float low, float high, float* scale, int8_t* zero) {
  const float s = (high - low) / 15;
  *scale = low == high ? 1 : s < kLeastScale ? kLeastScale : s;
  const bool finite = (BitsOf(*scale) & kMagnitude) < kInfinity;
  const float inverse = finite ? 1 / *scale : NotANumber();
  *zero = static_cast<int8_t>(finite ? Nearest(-8 - low * inverse) : 0);
  return inverse;
}

// ---- The elements of a group that its scale is made of. ----

using Ints = Vector<int32_t, kFloatLanes>;

// The largest of key(bits), and of 0, over the bits of `count` elements.
template <typename Key>
int32_t Largest(const float* w, int64_t count, Key key) {
  Ints most{};
  for (; count >= kFloatLanes; count -= kFloatLanes, w += kFloatLanes) {
    const Ints keys = key(BitCast<Ints>(Native<float>::Load(w)));
    most = keys > most ? keys : most;
  }
  int32_t lanes[kFloatLanes];
  std::memcpy(lanes, &most, sizeof lanes);
  int32_t largest = 0;
  for (int i = 0; i < kFloatLanes; ++i) largest = std::max(largest, lanes[i]);
  for (; count > 0; --count, ++w) largest = std::max(largest, key(BitsOf(*w)));
  return largest;
}

// NaN if any is.
inline float LargestMagnitude(const float* w, int64_t count) {
  return FloatOf(Largest(w, count, [](auto bits) { return bits & kMagnitude; }));
}

// Integers in the order of floats, with NaN at the ends; 0 for 0. The same for low and high as long as no sign is
// changed: so the least is found as the largest of the complement.
struct Extremes {
  float low, high;
  Extremes(const float* w, int64_t count)
      : low(FloatOf(Ordered(~Largest(w, count, [](auto bits) { return ~Ordered(bits); })))),
        high(FloatOf(Ordered(Largest(w, count, [](auto bits) { return Ordered(bits); })))) {}

 private:
  template <typename Bits>
  static Bits Ordered(Bits bits) {
    return bits ^ (bits >> 31 & kMagnitude);
  }
};

// ---- A part of the results. ----

// Groups whose scales are made together.
constexpr int64_t kGroupsTogether = 256;

// Calls function(code) for the codes whose scales alone tell how to make them.
template <typename F>
void ForCode(Code code, const F& function) {
  const int32_t largest = BitsOf(LargestCode(code));
  switch (code) {
    case Code::kInt8: return function(IntCode<8>{largest});
    case Code::kInt4: return function(IntCode<4>{largest});
    case Code::kFloat8E4M3: return function(Float8E4M3{largest});
    case Code::kFloat8E5M2: return function(Float8E5M2{largest});
    case Code::kFloat4E2M1: return function(Float4E2M1{largest});
  }
}

class Quantizer {
 public:
  Quantizer(const Quantization& quantization, const QuantizedBuffers& results)
      : quantization_(quantization), results_(results) {}

  // Of `count` results w, which are whole groups, or where the scale is given whole bytes of codes; `at` elements of
  // the array come before them.
  void Quantize(const float* w, int64_t count, int64_t at) const {
    if (quantization_.scale == Scale::kGiven) {
      const float inverse = 1 / *quantization_.given;
      return ForCode(quantization_.code, [&](auto code) { Encode(w, count, inverse, code, CodesAt(at)); });
    }
    const int64_t group = quantization_.group, most = kGroupsTogether * group;
    for (int64_t end = at + count; at < end; at += most, w += most) {
      const int64_t groups = std::min((end - at) / group, kGroupsTogether);
      if (quantization_.asymmetric) {
        QuantizeAsymmetric(w, groups, at);
      } else {
        QuantizeSymmetric(w, groups, at);
      }
    }
  }

 private:
  uint8_t* CodesAt(int64_t at) const {
    return static_cast<uint8_t*>(results_.codes) + at * CodeBits(quantization_.code) / 8;
  }
  template <typename T>
  T* ScalesAt(int64_t at) const {
    return static_cast<T*>(results_.scales) + at / quantization_.group;
  }

  void QuantizeSymmetric(const float* w, int64_t groups, int64_t at) const {
    const int64_t group = quantization_.group;
    float amax[kGroupsTogether], inverse[kGroupsTogether];
    for (int64_t i = 0; i < groups; ++i) amax[i] = LargestMagnitude(w + i * group, group);
    MakeScales(amax, groups, at, inverse);
    ForCode(quantization_.code, [&](auto code) {
      for (int64_t i = 0; i < groups; ++i) Encode(w + i * group, group, inverse[i], code, CodesAt(at + i * group));
    });
  }

  void MakeScales(const float* amax, int64_t groups, int64_t at, float* inverse) const {
    switch (quantization_.scale) {
      case Scale::kFloat32: {
        const float largest = LargestCode(quantization_.code);
        float* scales = ScalesAt<float>(at);
        for (int64_t i = 0; i < groups; ++i) inverse[i] = ScaleOfFloat32(amax[i], largest, scales + i);
        return;
      }
      case Scale::kE8M0: {
        const int exponent = LargestExponent(quantization_.code);
        uint8_t* scales = ScalesAt<uint8_t>(at);
        for (int64_t i = 0; i < groups; ++i) inverse[i] = ScaleOfE8M0(amax[i], exponent, scales + i);
        return;
      }
      case Scale::kE4M3: {
        const float tensor = quantization_.given ? *quantization_.given : 1;
        uint8_t* scales = ScalesAt<uint8_t>(at);
        for (int64_t i = 0; i < groups; ++i) inverse[i] = ScaleOfE4M3(amax[i], tensor, scales + i);
        return;
      }
      case Scale::kGiven: return;
    }
  }

  void QuantizeAsymmetric(const float* w, int64_t groups, int64_t at) const {
    const int64_t group = quantization_.group;
    float* scales = ScalesAt<float>(at);
    int8_t* zeros = results_.zero_points + at / group;
    for (int64_t i = 0; i < groups; ++i, w += group) {
      const Extremes extremes(w, group);
      const float inverse = ScaleAndZero(extremes.low, extremes.high, scales + i, zeros + i);
      Encode(w, group, inverse, AsymmetricInt4{zeros[i]}, CodesAt(at + i * group));
    }
  }

  const Quantization quantization_;
  const QuantizedBuffers results_;
};

}  // namespace
}  // namespace jax_hadacore::cpu
