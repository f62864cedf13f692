// codes.h: float32 numbers to codes of 8 or 4 bits, to nearest, ties to even.
//
// NaN is found by its bits, which as an integer are above those of infinity.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../quantization.h"
#include "vectors.h"

namespace jax_hadacore::cpu {
namespace {

using Floats = Lanes<float>;
using Ints = Vector<int32_t, kFloatLanes>;

constexpr int32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;

inline Ints BitsOf(const Floats& values) { return BitCast<Ints>(values); }
inline Floats FloatsOf(const Ints& bits) { return BitCast<Floats>(bits); }
inline Ints Min(const Ints& a, const Ints& b) { return a < b ? a : b; }
inline Ints Max(const Ints& a, const Ints& b) { return a > b ? a : b; }

// ---- A code's bits, in the low bits of integers; higher ones do not matter. ----

// A sign, an exponent, of which kLeast is the least of a normal number, and kMantissa bits.
template <int kCodeBits, int kMantissa, int kLeast, int32_t kNan>
struct FloatCode {
  Ints largest;  // a float's bits

  explicit FloatCode(Code code) : largest(BitsOf(Floats{} + LargestCode(code))) {}

  Ints operator()(const Floats& v) const {
    const Ints bits = BitsOf(v), magnitude = bits & kMagnitude;
    const Ints sign = bits >> (32 - kCodeBits) & 1 << (kCodeBits - 1);
    return magnitude > kInfinity ? Ints{} + kNan : Round(Min(magnitude, largest)) | sign;
  }

 private:
  // A sum with a power of two, whose unit in the last place is that of the code, is rounded as the code is, and counts
  // these units. A carry into the exponent is as it should be.
  static Ints Round(const Ints& magnitude) {
    constexpr int kShift = 23 - kMantissa;
    constexpr int32_t kLeastBits = (127 + kLeast) << 23;
    const Ints exponent = Max(magnitude & kInfinity, Ints{} + kLeastBits), power = exponent + (kShift << 23);
    return BitsOf(FloatsOf(magnitude) + FloatsOf(power)) - power + ((exponent - kLeastBits) >> kShift);
  }
};
using Float8E4M3 = FloatCode<8, 3, -6, 0x7f>;
using Float8E5M2 = FloatCode<8, 2, -14, 0x7e>;
using Float4E2M1 = FloatCode<4, 1, 0, 0>;

// The nearest integers, of magnitudes below 2^22: the unit in the last place of these sums is one.
inline Ints Nearest(const Floats& v) {
  const Floats units = Floats{} + 0x1.8p23f;
  return BitsOf(v + units) - BitsOf(units);
}

struct IntCode {
  Ints largest;  // a float's bits

  explicit IntCode(Code code) : largest(BitsOf(Floats{} + LargestCode(code))) {}

  Ints operator()(const Floats& v) const {
    const Ints bits = BitsOf(v), magnitude = bits & kMagnitude;
    const Ints limited = Min(magnitude, largest) | (bits & ~kMagnitude);
    return magnitude > kInfinity ? Ints{} : Nearest(FloatsOf(limited));
  }
};

struct AsymmetricInt4 {
  Ints zero;

  explicit AsymmetricInt4(int32_t zero_point) : zero(Ints{} + zero_point) {}

  Ints operator()(const Floats& v) const {
    const Ints code = Min(Max(Nearest(v) + zero, Ints{} - 8), Ints{} + 7);
    return (BitsOf(v) & kMagnitude) > kInfinity ? Ints{} : code;
  }
};

// Calls function(f) for what makes the codes, where they have no zero points.
template <typename F>
void ForCode(Code code, const F& function) {
  switch (code) {
    case Code::kInt8:
    case Code::kInt4: return function(IntCode(code));
    case Code::kFloat8E4M3: return function(Float8E4M3(code));
    case Code::kFloat8E5M2: return function(Float8E5M2(code));
    case Code::kFloat4E2M1: return function(Float4E2M1(code));
  }
}

// ---- The codes of arrays. ----

// Puts code(w * inverse) into the place of each of `count` numbers w.
template <typename C>
void Encode(float* w, int64_t count, float inverse, const C& code) {
  const auto encode = [&](float* at) { Native<float>::Store(at, FloatsOf(code(Native<float>::Load(at) * inverse))); };
  for (; count >= kFloatLanes; count -= kFloatLanes, w += kFloatLanes) encode(w);
  if (count == 0) return;
  float last[kFloatLanes] = {};
  const size_t left = static_cast<size_t>(count) * sizeof *w;
  std::memcpy(last, w, left);
  encode(last);
  std::memcpy(w, last, left);
}

// Stores such codes. The loops are simple, so that compilers find the best instructions for them.
inline void StoreBytes(const float* codes, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(BitCast<uint32_t>(codes[i]));
}
inline void StoreHalfBytes(const float* codes, int64_t count, uint8_t* to) {
  constexpr int64_t kMost = 512;
  for (; count > 0; count -= kMost, codes += kMost, to += kMost / 2) {
    const int64_t some = std::min(count, kMost);
    uint16_t pairs[kMost / 2];
    StoreBytes(codes, some, reinterpret_cast<uint8_t*>(pairs));
    for (int64_t i = 0; i < some / 2; ++i) to[i] = static_cast<uint8_t>((pairs[i] & 0xf) | (pairs[i] >> 4 & 0xf0));
  }
}

}  // namespace
}  // namespace jax_hadacore::cpu
