// device.h: what nvcc knows without an #include, so that g++ compiles the kernels unchanged. Included before each of
// them (g++ -include); emulator.cc runs what is compiled so, and instructions.cc computes what single instructions do.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulation {

struct Index {
  unsigned x;
};
Index ThreadIndex();
Index BlockIndex();
Index BlockSize();

}  // namespace emulation

#define __global__
#define __grid_constant__
#define __device__
// Shared memory is declared `extern __shared__ T name[]`: runtime.cc defines the name. One block runs at a time.
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::emulation::ThreadIndex())
#define blockDim (::emulation::BlockSize())
#define blockIdx (::emulation::BlockIndex())

using std::fma;
using std::max;
using std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the eight bytes of a (the low four) and b, those that the low three bits of the selector's nibbles name.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << shift >> 32);
}
inline float __saturatef(float v) { return v > 0 ? std::min(v, 1.0f) : 0; }  // 0 of NaN
inline float __fmul_rn(float a, float b) { return a * b; }                   // compiled without contraction

uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int lane_mask);
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(value), lane_mask));
}
unsigned __reduce_max_sync(unsigned mask, unsigned value);
int __any_sync(unsigned mask, int predicate);
unsigned __ballot_sync(unsigned mask, int predicate);
void __syncthreads();
