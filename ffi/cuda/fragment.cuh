// fragment.cuh: loads, transforms and stores a fragment, 256 consecutive elements of which a lane of one warp holds 8.
//
// 16-bit types: two 16-point steps on the tensor cores (layout.h). Products with +-1 are exact and sums are float32;
// between the steps a sum travels as two bfloat16, hi + lo, which keep 16 bits of it and its whole exponent range.
// float32: butterflies, between lanes by shuffles.
#pragma once

#include <cstdint>

#include "layout.h"
#include "ptx.cuh"
#include "signs.cuh"

namespace jax_hadacore::cuda {

constexpr unsigned kWarp = 0xffffffffu;  // all lanes
constexpr unsigned kAllSlots = (1u << kSlots) - 1;

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x % 32); }

constexpr int Min(int a, int b) { return a < b ? a : b; }
constexpr int Max(int a, int b) { return a > b ? a : b; }

// An element type as kernels store it: rounded from float32, which is the only rounding.
template <typename T>
struct Element {
  static_assert(std::is_same_v<T, F16> || std::is_same_v<T, BF16>, "other types are below");
  using Storage = uint16_t;
  static __device__ __forceinline__ Storage Round(float v) { return static_cast<Storage>(Pack<T>(v, 0)); }
  // 2 or 4 consecutive elements, to an address aligned to their size, with signs.
  template <int kCount>
  static __device__ __forceinline__ void Store(Storage* to, const float (&v)[kCount], float scale,
                                               PackedSigns<kCount> signs = {}) {
    const uint32_t low = Pack<T>(v[0] * scale, v[1] * scale) ^ signs.Pair(0);
    if constexpr (kCount == 4) {
      StoreWords(to, low, Pack<T>(v[2] * scale, v[3] * scale) ^ signs.Pair(1));
    } else {
      *reinterpret_cast<uint32_t*>(to) = low;
    }
  }
};

template <>
struct Element<float> {
  using Storage = float;
  static __device__ __forceinline__ float Round(float v) { return v; }
  template <int kCount>
  static __device__ __forceinline__ void Store(float* to, const float (&v)[kCount], float scale,
                                               PackedSigns<kCount> signs = {}) {
    const auto result = [&](int i) { return __float_as_uint(signs.Apply(v[i] * scale, i)); };
    if constexpr (kCount == 4) {
      StoreWords(to, result(0), result(1), result(2), result(3));
    } else {
      StoreWords(to, result(0), result(1));
    }
  }
};

template <>
struct Element<double> {
  using Storage = double;
  static __device__ __forceinline__ double Round(double v) { return v; }
};

// Two sums as two bfloat16 each, hi + lo, which keep 16 of their bits: operands of a further product.
struct HiLo {
  uint32_t hi, lo;
  __device__ __forceinline__ HiLo(float a, float b) {
    hi = Pack<BF16>(a, b);
    lo = Pack<BF16>(a - __uint_as_float(hi << 16), b - __uint_as_float(hi & 0xffff0000u));
  }
};

// Unnormalised butterflies among a lane's slots, of strides kFirst, 2 kFirst, ... kSpan / 2.
template <int kSpan, int kFirst>
__device__ __forceinline__ void SlotButterflies(float (&v)[kSlots]) {
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

// And between lanes, on the lowest kBits bits of their number.
template <int kBits>
__device__ __forceinline__ void LaneButterflies(float (&v)[kSlots]) {
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const float sign = Lane() >> bit & 1 ? -1.0f : 1.0f;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) v[s] = fmaf(sign, v[s], __shfl_xor_sync(kWarp, v[s], 1 << bit));
  }
}

template <typename T>
struct Fragment;

// The lane's part of a step's matrix, as operand A. Its four registers are 8x8 quarters of the matrix: H and the
// identity on the highest bit repeat, drop or negate one quarter (SignQuarters in layout.h), so one is computed.
// kApart: ptxas is made to keep all four, where it would copy them again for each of many products.
template <typename T, int kMask, bool kApart>
struct SignMatrix {
  uint32_t registers[4];

  __device__ __forceinline__ SignMatrix() {
    constexpr uint32_t kOne = std::is_same_v<T, F16> ? 0x3c00 : 0x3f80;
    constexpr unsigned kMinus[] = {LanesOf(-1, 0, kMask), LanesOf(-1, 1, kMask)};
    constexpr unsigned kZero[] = {LanesOf(0, 0, kMask), LanesOf(0, 1, kMask)};
    uint32_t quarter = (kMinus[0] >> Lane() & 1) << 15 | kMinus[1] >> Lane() << 31;
    quarter |= (~kZero[0] >> Lane() & 1) * kOne | (~kZero[1] >> Lane() & 1) * kOne << 16;
    const uint32_t beside = kMask & 8 ? quarter : 0;
    registers[0] = quarter;
    registers[1] = kApart ? Opaque<0>(beside) : beside;
    registers[2] = kApart ? Opaque<1>(beside) : beside;
    registers[3] = kMask & 8 ? quarter ^ kAllSigns : quarter;
  }

  // this * B + c.
  __device__ __forceinline__ void MultiplyAdd(float (&d)[4], uint32_t b0, uint32_t b1, const float (&c)[4] = {}) const {
    MatrixMultiplyAdd<T>(d, registers, b0, b1, c);
  }
};

template <typename T>
struct Fragment16 {
  using Storage = uint16_t;
  static constexpr bool kMayBeUnsafe = true;
  static constexpr bool kAddsSegments = true;

  uint32_t raw[4];

  // The signs of the lane's slots; none by default.
  using Signs = PackedSigns<kSlots>;
  // In a fragment of rows of 2^kBits elements, or of a longer one, whose signs from the fragment's first element on
  // are given.
  template <int kBits>
  static __device__ __forceinline__ Signs SlotSigns(const uint32_t* signs) {
    return Signs::template FromRows<kBits>(signs, kSlots * Lane());
  }
  __device__ __forceinline__ void Apply(Signs signs) {
#pragma unroll
    for (int r = 0; r < 4; ++r) raw[r] ^= signs.Pair(r);
  }

  // Where the first and the second four of a lane's 8 slots are in the fragment, in units of 4 elements.
  static __device__ __forceinline__ int Quad(int half) { return 2 * Lane() + half; }

  // Starts to copy what Load(to + kOffset) will read to shared memory.
  template <int kOffset>
  static __device__ __forceinline__ void StartLoad(Storage* to, const Storage* from) {
    StartCopy<kOffset * sizeof(Storage)>(to + kSlots * Lane(), from + kSlots * Lane());
  }

  __device__ __forceinline__ void Load(const Storage* from) { LoadOwn(reinterpret_cast<const uint4*>(from) + Lane()); }
  // The lane's own slots, from an address of its own.
  __device__ __forceinline__ void LoadOwn(const uint4* from) {
    const uint4 v = *from;
    raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
  }

  // Of the lane's slots, as bits, those of the fragment's first `count` elements.
  static __device__ __forceinline__ unsigned SlotsBelow(int64_t count) {
    const int64_t left = count - kSlots * Lane();
    return left >= kSlots ? kAllSlots : left > 0 ? (1u << left) - 1 : 0;
  }

  // Element by element, for an end of the array or an unaligned one: those that are not in `slots` are 0.
  __device__ __forceinline__ void LoadSlots(const Storage* from, unsigned slots) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int at = Lane() * kSlots + 2 * r;
      raw[r] =
          (slots >> 2 * r & 1 ? from[at] : 0u) | (slots >> 2 * r & 2 ? static_cast<uint32_t>(from[at + 1]) << 16 : 0u);
    }
  }

  static __device__ __forceinline__ void Store(Storage* to, const float (&v)[kSlots], float scale, Signs signs = {}) {
    const auto pair = [&](int r) { return Pack<T>(v[2 * r] * scale, v[2 * r + 1] * scale) ^ signs.Pair(r); };
    reinterpret_cast<uint4*>(to)[Lane()] = make_uint4(pair(0), pair(1), pair(2), pair(3));
  }

  static __device__ __forceinline__ void StoreSlots(Storage* to, const float (&v)[kSlots], float scale, unsigned slots,
                                                    Signs signs = {}) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (slots >> s & 1)
        to[Lane() * kSlots + s] =
            static_cast<Storage>(Element<T>::Round(v[s] * scale) ^ signs.Pair(s / 2) >> 16 * (s % 2));
  }

  // The two steps' matrices for rows of 2^kBits elements, or for the lowest 8 bits of longer ones.
  template <int kBits, bool kApart = false>
  struct Matrices {
    SignMatrix<T, TransformedBits(1, kBits), kApart> step1;
    SignMatrix<BF16, TransformedBits(2, kBits), kApart> step2;
  };

  // Transforms the rows of a fragment in which nothing is unsafe, or which is part of one row.
  template <typename Matrices>
  __device__ __forceinline__ void Transform(float (&v)[kSlots], const Matrices& matrices) const {
    float sums[2][4];
    Step1(sums, matrices.step1);
    Step2(v, sums, matrices);
  }

  // Transforms a + b, fragments at the same place of two segments of a row. That is the butterfly of the row's highest
  // bit, done first, and on the tensor cores: their sums are float32.
  template <typename Matrices>
  static __device__ __forceinline__ void TransformSum(float (&v)[kSlots], const Fragment16& a, const Fragment16& b,
                                                      const Matrices& matrices) {
    float of_a[2][4], sums[2][4];
    a.Step1(of_a, matrices.step1);
    b.Step1(sums, matrices.step1, of_a);
    Step2(v, sums, matrices);
  }

  // Transforms a + b and a - b.
  template <typename Matrices>
  static __device__ __forceinline__ void TransformSumAndDifference(float (&sum)[kSlots], float (&difference)[kSlots],
                                                                   const Fragment16& a, Fragment16 b,
                                                                   const Matrices& matrices) {
    float of_a[2][4], sums[2][4];
    a.Step1(of_a, matrices.step1);
    b.Step1(sums, matrices.step1, of_a);
    Step2(sum, sums, matrices);
    b.ChangeSigns(kAllSigns);
    b.Step1(sums, matrices.step1, of_a);
    Step2(difference, sums, matrices);
  }

  // Flips the sign of every element (kAllSigns) or none (0).
  __device__ __forceinline__ void ChangeSigns(uint32_t signs) {
#pragma unroll
    for (uint32_t& r : raw) r ^= signs;
  }

  // A row that holds something unsafe has a result of at least that magnitude, or NaN: the mean square of a row's
  // results is n times that of its elements, and half of it allows for what is lost to rounding.
  static constexpr float kLeastOfUnsafe = 0x1p119f;

  // Whether the lane holds what may spread to other rows of the fragment: rows shorter than it meet zeros in the
  // matrices, and 0 * infinity is NaN.
  __device__ __forceinline__ bool HasUnsafe() const {
    constexpr uint32_t kToSignBit = (0x8000 - kUnsafe) * 0x10001;  // added to an unsafe magnitude, it sets the sign bit
    uint32_t carried = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) carried |= (raw[r] & 0x7fff7fffu) + kToSignBit;
    return carried & kAllSigns;
  }

  // The slots of rows that hold something unsafe in any lane.
  template <int kBits>
  __device__ __forceinline__ unsigned UnsafeRows() const {
    return WholeRows<kBits>(UnsafeSlots());
  }

  __device__ __forceinline__ void Zero(unsigned slots) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (slots >> s & 1) raw[s / 2] &= s % 2 ? 0x0000ffffu : 0xffff0000u;
  }

  // Transforms rows of 2^kBits < 256 elements by butterflies, which keep to their row.
  template <int kBits>
  __device__ __forceinline__ void TransformByButterflies(float (&v)[kSlots]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 pair = Unpack<T>(raw[r]);
      v[2 * r] = pair.x, v[2 * r + 1] = pair.y;
    }
    SlotButterflies<1 << Min(kBits, 3), 1>(v);
    LaneButterflies<Max(kBits - 3, 0)>(v);
  }

 private:
  // Step 1 of this fragment, added to c.
  template <typename Matrix>
  __device__ __forceinline__ void Step1(float (&sums)[2][4], const Matrix& matrix, const float (&c)[2][4] = {}) const {
    matrix.MultiplyAdd(sums[0], raw[0], raw[1], c[0]);
    matrix.MultiplyAdd(sums[1], raw[2], raw[3], c[1]);
  }

  template <typename Matrices>
  static __device__ __forceinline__ void Step2(float (&v)[kSlots], const float (&first)[2][4],
                                               const Matrices& matrices) {
#pragma unroll
    for (int index = 0; index < 2; ++index) {
      uint32_t hi[2], lo[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const HiLo sums(first[r][2 * index], first[r][2 * index + 1]);
        hi[r] = sums.hi;
        lo[r] = sums.lo;
      }
      float second[4];
      matrices.step2.MultiplyAdd(second, lo[0], lo[1]);
      matrices.step2.MultiplyAdd(second, hi[0], hi[1], second);
#pragma unroll
      for (int c = 0; c < 4; ++c) v[Slot(index, c)] = second[c];
    }
  }

  // The bits, without sign, of a magnitude below which no sum of 128 elements is infinite. For float16 that takes an
  // infinity, since sums are float32; for bfloat16 it is 2^120.
  static constexpr uint32_t kUnsafe = std::is_same_v<T, F16> ? 0x7c00 : 0x7b80;

  // Of the lane's slots, as bits, the unsafe ones.
  __device__ __forceinline__ unsigned UnsafeSlots() const {
    unsigned slots = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if ((raw[s / 2] >> (16 * (s % 2)) & 0x7fff) >= kUnsafe) slots |= 1u << s;
    return slots;
  }

  // The slots of every row of which a slot is given, by any lane.
  template <int kBits>
  static __device__ __forceinline__ unsigned WholeRows(unsigned slots) {
    if constexpr (kBits >= 3) {  // a row is 2^(kBits - 3) lanes
      constexpr int kLanes = 1 << (kBits - 3);
      constexpr unsigned kRow = kLanes == 32 ? kWarp : (1u << kLanes) - 1;
      const unsigned lanes = __ballot_sync(kWarp, slots != 0);
      return lanes >> (Lane() / kLanes * kLanes) & kRow ? kAllSlots : 0;
    } else {
      constexpr unsigned kRow = (1u << (1 << kBits)) - 1;
#pragma unroll
      for (int s = 0; s < kSlots; s += 1 << kBits)
        if (slots & kRow << s) slots |= kRow << s;
      return slots;
    }
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
  static constexpr bool kMayBeUnsafe = false;  // butterflies keep to their row
  static constexpr bool kAddsSegments = false;

  float raw[kSlots];

  struct Signs {
    PackedSigns<4> of_half[2];
  };
  template <int kBits>
  static __device__ __forceinline__ Signs SlotSigns(const uint32_t* signs) {
    return {{PackedSigns<4>::FromRows<kBits>(signs, 4 * Quad(0)), PackedSigns<4>::FromRows<kBits>(signs, 4 * Quad(1))}};
  }
  __device__ __forceinline__ void Apply(const Signs& signs) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) raw[s] = signs.of_half[s / 4].Apply(raw[s], s % 4);
  }

  static __device__ __forceinline__ int Quad(int half) { return 32 * half + Lane(); }

  template <int kOffset>
  static __device__ __forceinline__ void StartLoad(float* to, const float* from) {
    StartCopy<kOffset * sizeof(float)>(to + 4 * Quad(0), from + 4 * Quad(0));
    StartCopy<kOffset * sizeof(float)>(to + 4 * Quad(1), from + 4 * Quad(1));
  }

  __device__ __forceinline__ void Load(const float* from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 v = reinterpret_cast<const float4*>(from)[Quad(half)];
      raw[4 * half] = v.x, raw[4 * half + 1] = v.y, raw[4 * half + 2] = v.z, raw[4 * half + 3] = v.w;
    }
  }

  static __device__ __forceinline__ unsigned SlotsBelow(int64_t count) {
    unsigned slots = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (4 * Quad(s / 4) + s % 4 < count) slots |= 1u << s;
    return slots;
  }

  __device__ __forceinline__ void LoadSlots(const float* from, unsigned slots) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) raw[s] = slots >> s & 1 ? from[4 * Quad(s / 4) + s % 4] : 0;
  }

  static __device__ __forceinline__ void Store(float* to, const float (&v)[kSlots], float scale,
                                               const Signs& signs = {}) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto result = [&](int i) { return signs.of_half[half].Apply(v[4 * half + i] * scale, i); };
      reinterpret_cast<float4*>(to)[Quad(half)] = make_float4(result(0), result(1), result(2), result(3));
    }
  }

  static __device__ __forceinline__ void StoreSlots(float* to, const float (&v)[kSlots], float scale, unsigned slots,
                                                    const Signs& signs = {}) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (slots >> s & 1) to[4 * Quad(s / 4) + s % 4] = signs.of_half[s / 4].Apply(v[s] * scale, s % 4);
  }

  template <int kBits, bool kApart = false>
  struct Matrices {};

  template <int kBits, bool kApart>
  __device__ __forceinline__ void Transform(float (&v)[kSlots], const Matrices<kBits, kApart>&) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) v[s] = raw[s];
    SlotButterflies<1 << Min(kBits, 2), 1>(v);
    LaneButterflies<Max(Min(kBits - 2, 5), 0)>(v);
    if constexpr (kBits >= 8) SlotButterflies<8, 4>(v);
  }
};

// 1, 2 or 4 consecutive floats, from or to an address aligned to their size.
template <int kWidth>
__device__ __forceinline__ void LoadVector(float (&v)[kWidth], const float* from) {
  if constexpr (kWidth == 4) {
    const float4 q = *reinterpret_cast<const float4*>(from);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  } else if constexpr (kWidth == 2) {
    const float2 q = *reinterpret_cast<const float2*>(from);
    v[0] = q.x, v[1] = q.y;
  } else {
    static_assert(kWidth == 1);
    v[0] = *from;
  }
}
template <int kWidth>
__device__ __forceinline__ void StoreVector(float* to, const float (&v)[kWidth]) {
  if constexpr (kWidth == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
  } else if constexpr (kWidth == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
  } else {
    static_assert(kWidth == 1);
    *to = v[0];
  }
}

// Unnormalised butterflies over the first index, of strides kFirst, 2 kFirst, ... kSpan / 2; 0: all up to the end.
template <int kFirst = 1, int kSpan = 0, int kCount, int kWidth>
__device__ __forceinline__ void Butterflies(float (&v)[kCount][kWidth]) {
#pragma unroll
  for (int h = kFirst; h < (kSpan ? kSpan : kCount); h *= 2)
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
