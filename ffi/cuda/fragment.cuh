// fragment.cuh: loads, transforms and stores a fragment, 256 consecutive elements of which a lane of one warp holds 8.
//
// 16-bit types: two 16-point steps on the tensor cores (layout.h). Products with +-1 are exact and sums are float32;
// between the steps a sum travels as two bfloat16, hi + lo, which keep 16 bits of it and its whole exponent range.
// float32: butterflies, between lanes by shuffles.
#pragma once

#include <cstdint>

#include "layout.h"
#include "ptx.cuh"

namespace jax_hadacore::cuda {

constexpr unsigned kWarp = 0xffffffffu;  // all lanes

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x % 32); }

constexpr int Min(int a, int b) { return a < b ? a : b; }
constexpr int Max(int a, int b) { return a > b ? a : b; }

// An element type as kernels store it: rounded from float32, which is the only rounding.
template <typename T>
struct Element {
  using Storage = uint16_t;
  static __device__ __forceinline__ Storage Round(float v) { return static_cast<Storage>(Pack<T>(v, 0)); }
  // 2 or 4 consecutive elements, to an address aligned to their size.
  template <int kCount>
  static __device__ __forceinline__ void Store(Storage* to, const float (&v)[kCount], float scale) {
    const uint32_t low = Pack<T>(v[0] * scale, v[1] * scale);
    if constexpr (kCount == 4) {
      __stcs(reinterpret_cast<uint2*>(to), make_uint2(low, Pack<T>(v[2] * scale, v[3] * scale)));
    } else {
      __stcs(reinterpret_cast<uint32_t*>(to), low);
    }
  }
};

template <>
struct Element<float> {
  using Storage = float;
  static __device__ __forceinline__ float Round(float v) { return v; }
  template <int kCount>
  static __device__ __forceinline__ void Store(float* to, const float (&v)[kCount], float scale) {
    if constexpr (kCount == 4) {
      __stcs(reinterpret_cast<float4*>(to), make_float4(v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale));
    } else {
      __stcs(reinterpret_cast<float2*>(to), make_float2(v[0] * scale, v[1] * scale));
    }
  }
};

template <typename T>
struct Fragment;

// The lane's part of a step's matrix, as operand A. Its four registers are 8x8 quarters of the matrix: H and the
// identity on the highest bit repeat, drop or negate one quarter (SignQuarters in layout.h), so one register has it
// all.
template <typename T, int kMask>
struct SignMatrix {
  uint32_t quarter;

  __device__ __forceinline__ SignMatrix() : quarter(0) {
    constexpr uint32_t kOne = std::is_same_v<T, F16> ? 0x3c00 : 0x3f80;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = ARow(Lane(), 0), column = AColumn(Lane(), 0, h);
      const uint32_t minus = __popc(row & column & kMask) % 2 ? 0x8000u : 0u;
      const uint32_t entry = (row ^ column) & ~kMask ? 0u : kOne | minus;  // Sign() of layout.h
      quarter |= entry << (16 * h);
    }
  }

  // d += this * B.
  __device__ __forceinline__ void MultiplyAdd(float (&d)[4], uint32_t b0, uint32_t b1) const {
    const uint32_t beside = kMask & 8 ? quarter : 0, last = kMask & 8 ? quarter ^ 0x80008000u : quarter;
    MatrixMultiplyAdd<T>(d, {quarter, beside, beside, last}, b0, b1);
  }
};

template <typename T>
struct Fragment16 {
  using Storage = uint16_t;

  uint32_t raw[4];

  // Where the first and the second four of a lane's 8 slots are in the fragment, in units of 4 elements.
  static __device__ __forceinline__ int Quad(int half) { return 2 * Lane() + half; }

  __device__ __forceinline__ void Load(const Storage* from) {
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(from) + Lane());
    raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
  }

  // Element by element, for an end of the array or an unaligned one: elements from `count` on are 0.
  __device__ __forceinline__ void LoadSlowly(const Storage* from, int64_t count) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int at = Lane() * kSlots + 2 * r;
      raw[r] = (at < count ? from[at] : 0u) | (at + 1 < count ? static_cast<uint32_t>(from[at + 1]) << 16 : 0u);
    }
  }

  static __device__ __forceinline__ void Store(Storage* to, const float (&v)[kSlots], float scale) {
    __stcs(reinterpret_cast<uint4*>(to) + Lane(),
           make_uint4(Pack<T>(v[0] * scale, v[1] * scale), Pack<T>(v[2] * scale, v[3] * scale),
                      Pack<T>(v[4] * scale, v[5] * scale), Pack<T>(v[6] * scale, v[7] * scale)));
  }

  static __device__ __forceinline__ void StoreSlowly(Storage* to, const float (&v)[kSlots], float scale,
                                                     int64_t count) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int at = Lane() * kSlots + s;
      if (at < count) to[at] = Element<T>::Round(v[s] * scale);
    }
  }

  // The two steps' matrices for rows of 2^kBits elements, or for the lowest 8 bits of longer ones.
  template <int kBits>
  struct Matrices {
    SignMatrix<T, TransformedBits(1, kBits)> step1;
    SignMatrix<BF16, TransformedBits(2, kBits)> step2;
  };

  template <int kBits>
  __device__ __forceinline__ void Transform(float (&v)[kSlots], const Matrices<kBits>& matrices) {
    // Rows shorter than the fragment meet zeros in the matrices, and 0 * infinity would spread from row to row.
    if constexpr (kBits < 8) {
      if (__any_sync(kWarp, HasUnsafe())) return TransformRowByRow(v, matrices);
    }
    TransformSafe(v, matrices);
  }

 private:
  // The bits, without sign, of infinity, and of the least magnitude with which sums of 128 elements may reach it. For
  // float16 that takes an infinity, since sums are float32; for bfloat16 it is 2^120.
  static constexpr uint32_t kInfinite = std::is_same_v<T, F16> ? 0x7c00 : 0x7f80;
  static constexpr uint32_t kUnsafe = std::is_same_v<T, F16> ? kInfinite : 0x7b80;

  template <int kBits>
  __device__ __forceinline__ void TransformSafe(float (&v)[kSlots], const Matrices<kBits>& matrices) const {
    float first[2][4] = {};
    matrices.step1.MultiplyAdd(first[0], raw[0], raw[1]);
    matrices.step1.MultiplyAdd(first[1], raw[2], raw[3]);
#pragma unroll
    for (int index = 0; index < 2; ++index) {
      uint32_t hi[2], lo[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float a = first[r][2 * index], b = first[r][2 * index + 1];
        hi[r] = Pack<BF16>(a, b);
        lo[r] = Pack<BF16>(a - __uint_as_float(hi[r] << 16), b - __uint_as_float(hi[r] & 0xffff0000u));
      }
      float second[4] = {};
      matrices.step2.MultiplyAdd(second, lo[0], lo[1]);
      matrices.step2.MultiplyAdd(second, hi[0], hi[1]);
#pragma unroll
      for (int c = 0; c < 4; ++c) v[Slot(index, c)] = second[c];
    }
  }

  // For a fragment with rows that could spread: those are transformed apart, scaled down by 2^8; a row with an infinity
  // or NaN becomes NaN.
  template <int kBits>
  __device__ void TransformRowByRow(float (&v)[kSlots], const Matrices<kBits>& matrices) const {
    const unsigned unsafe = WholeRows<kBits>(SlotsFrom(kUnsafe));
    const unsigned infinite = WholeRows<kBits>(SlotsFrom(kInfinite));
    Fragment16 safe = *this;
    safe.Zero(unsafe);
    safe.TransformSafe(v, matrices);
    if constexpr (kUnsafe != kInfinite) {
      Fragment16 large = *this;
      large.Zero(~unsafe | infinite);
#pragma unroll
      for (int r = 0; r < 4; ++r) large.raw[r] = PackedFma(large.raw[r], 0x3b803b80u, 0x80008000u);  // * 2^-8 + -0
      float w[kSlots];
      large.TransformSafe(w, matrices);
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
        if (unsafe >> s & 1) v[s] = w[s] * 256;
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (infinite >> s & 1) v[s] = __uint_as_float(0x7fc00000u);  // NaN
  }

  __device__ __forceinline__ bool HasUnsafe() const {
    constexpr uint32_t kToSignBit = (0x8000 - kUnsafe) * 0x10001;  // added to an unsafe magnitude, it sets the sign bit
    uint32_t carried = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) carried |= (raw[r] & 0x7fff7fffu) + kToSignBit;
    return carried & 0x80008000u;
  }

  // Of the lane's slots, as bits, those of a magnitude from `least` on.
  __device__ __forceinline__ unsigned SlotsFrom(uint32_t least) const {
    unsigned slots = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if ((raw[s / 2] >> (16 * (s % 2)) & 0x7fff) >= least) slots |= 1u << s;
    return slots;
  }

  // The slots of every row of which a slot is given, by any lane.
  template <int kBits>
  static __device__ __forceinline__ unsigned WholeRows(unsigned slots) {
    if constexpr (kBits >= 3) {  // a row is 2^(kBits - 3) lanes
      constexpr int kLanes = 1 << (kBits - 3);
      constexpr unsigned kRow = kLanes == 32 ? kWarp : (1u << kLanes) - 1;
      const unsigned lanes = __ballot_sync(kWarp, slots != 0);
      return lanes >> (Lane() / kLanes * kLanes) & kRow ? 0xff : 0;
    } else {
      constexpr unsigned kRow = (1u << (1 << kBits)) - 1;
#pragma unroll
      for (int s = 0; s < kSlots; s += 1 << kBits)
        if (slots & kRow << s) slots |= kRow << s;
      return slots;
    }
  }

  __device__ __forceinline__ void Zero(unsigned slots) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (slots >> s & 1) raw[s / 2] &= s % 2 ? 0x0000ffffu : 0xffff0000u;
  }
};

template <>
struct Fragment<F16> : Fragment16<F16> {};
template <>
struct Fragment<BF16> : Fragment16<BF16> {};

// float32: slots 0 to 3 are 4 consecutive elements of the first 128, slots 4 to 7 those of the second.
template <>
struct Fragment<float> {
  using Storage = float;

  float raw[kSlots];

  static __device__ __forceinline__ int Quad(int half) { return 32 * half + Lane(); }

  __device__ __forceinline__ void Load(const float* from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 v = __ldcs(reinterpret_cast<const float4*>(from) + Quad(half));
      raw[4 * half] = v.x, raw[4 * half + 1] = v.y, raw[4 * half + 2] = v.z, raw[4 * half + 3] = v.w;
    }
  }

  __device__ __forceinline__ void LoadSlowly(const float* from, int64_t count) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int at = 4 * Quad(s / 4) + s % 4;
      raw[s] = at < count ? from[at] : 0;
    }
  }

  static __device__ __forceinline__ void Store(float* to, const float (&v)[kSlots], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float quad[4] = {v[4 * half], v[4 * half + 1], v[4 * half + 2], v[4 * half + 3]};
      Element<float>::Store<4>(to + 4 * Quad(half), quad, scale);
    }
  }

  static __device__ __forceinline__ void StoreSlowly(float* to, const float (&v)[kSlots], float scale, int64_t count) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int at = 4 * Quad(s / 4) + s % 4;
      if (at < count) to[at] = v[s] * scale;
    }
  }

  template <int kBits>
  struct Matrices {};

  template <int kBits>
  __device__ __forceinline__ void Transform(float (&v)[kSlots], const Matrices<kBits>&) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) v[s] = raw[s];
    SlotButterflies<1 << Min(kBits, 2), 1>(v);
#pragma unroll
    for (int bit = 0; bit < Min(kBits - 2, 5); ++bit) {
      const float sign = Lane() >> bit & 1 ? -1.0f : 1.0f;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) v[s] = fmaf(sign, v[s], __shfl_xor_sync(kWarp, v[s], 1 << bit));
    }
    if constexpr (kBits >= 8) SlotButterflies<8, 4>(v);
  }

 private:
  // Strides kFirst, 2 kFirst, ... kSpan / 2 among the slots.
  template <int kSpan, int kFirst>
  static __device__ __forceinline__ void SlotButterflies(float (&v)[kSlots]) {
#pragma unroll
    for (int h = kFirst; h < kSpan; h *= 2)
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
        if (!(s & h)) {
          const float a = v[s], b = v[s + h];
          v[s] = a + b;
          v[s + h] = a - b;
        }
  }
};

// Unnormalised butterflies over the first index.
template <int kCount, int kWidth>
__device__ __forceinline__ void Butterflies(float (&v)[kCount][kWidth]) {
#pragma unroll
  for (int h = 1; h < kCount; h *= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (!(i & h))
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float a = v[i][j], b = v[i + h][j];
          v[i][j] = a + b;
          v[i + h][j] = a - b;
        }
}

}  // namespace jax_hadacore::cuda
