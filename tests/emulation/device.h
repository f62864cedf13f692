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

}  // namespace emulation

#define __global__
#define __device__
// Shared memory is declared `extern __shared__ T name[]`: emulator.cc defines the name. One block runs at a time.
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::emulation::ThreadIndex())
#define blockIdx (::emulation::BlockIndex())

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

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float __shfl_xor_sync(unsigned mask, float value, int lane_mask);
int __any_sync(unsigned mask, int predicate);
unsigned __ballot_sync(unsigned mask, int predicate);
void __syncthreads();
