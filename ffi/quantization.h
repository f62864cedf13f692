// quantization.h: how the results of a transform become codes of 8 or 4 bits. Knows neither XLA nor CUDA.
#pragma once

#include <cstdint>

namespace jax_hadacore {

// 4-bit codes are packed two to a byte, the first of a pair in the low half.
enum class Code { kInt8, kInt4, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 };

// What the scales are: float32; powers of two, of which the exponent plus 127 is stored in a byte; E4M3 numbers, in
// units of a float32 scale of the tensor; or a single float32 number that is given.
enum class Scale { kFloat32, kE8M0, kE4M3, kGiven };

// The largest code, and its exponent.
constexpr float LargestCode(Code code) {
  switch (code) {
    case Code::kInt8: return 127;
    case Code::kInt4: return 7;
    case Code::kFloat8E4M3: return 448;
    case Code::kFloat8E5M2: return 57344;
    default: return 6;
  }
}
constexpr int LargestExponent(Code code) { return code == Code::kFloat8E4M3 ? 8 : code == Code::kFloat8E5M2 ? 15 : 2; }

constexpr int CodeBits(Code code) { return code == Code::kInt4 || code == Code::kFloat4E2M1 ? 4 : 8; }

// Every `group` consecutive results share a scale; a group lies in one row of the array, which is a group itself or
// consists of several, but may be of several of the transform's rows.
struct Quantization {
  Code code;
  Scale scale;
  int64_t group;
  bool asymmetric = false;       // int4 with a zero point to each scale
  const float* given = nullptr;  // the scale (kGiven), or the tensor's (kE4M3; null for 1), in the memory that x is in
};

struct QuantizedBuffers {
  void* codes;
  void* scales;         // null where they are given
  int8_t* zero_points;  // null where symmetric
};

}  // namespace jax_hadacore
