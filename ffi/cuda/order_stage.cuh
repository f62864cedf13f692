// order_stage.cuh: what the kernels of rows whose length is no power of two share: a block's rows in shared memory, and
// results on their way out.
#pragma once

#include "kernels.h"
#include "signs.cuh"

namespace jax_hadacore::cuda {

constexpr int kOrderThreads = 32 * kOrderWarps;

// A block's rows in global memory.
struct BlockRows {
  const uint16_t* x;
  uint16_t* y;
  int n, rows;

  __device__ __forceinline__ explicit BlockRows(const Work& work) {
    const int64_t first = blockIdx.x * work.per_block;
    n = static_cast<int>(work.n);
    rows = static_cast<int>(min(work.per_block, work.count - first));
    x = static_cast<const uint16_t*>(work.x) + first * n;
    y = static_cast<uint16_t*>(work.y) + first * n;
  }
};

// The signs of a row's elements, or null.
__device__ __forceinline__ const uint32_t* SignsOf(const Work& work, const uint32_t* words) {
  if (work.words_before_signs < 0) return nullptr;
  return work.device_signs ? work.device_signs : words + work.words_before_signs;
}

// Brings a block's rows to shared memory, element i to place(i), which keeps 8 aligned ones together; with their signs,
// where there are some. Every thread signs what it has copied itself.
template <typename Place>
__device__ __forceinline__ void StageRows(uint16_t* staged, const BlockRows& block, const uint32_t* signs, bool aligned,
                                          const Place& place) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int n = block.n, elements = block.rows * n, whole = aligned ? elements / 8 : 0;
  for (int i = thread; i < whole; i += threads) StartCopy<0>(staged + place(8 * i), block.x + 8 * i);
  for (int i = 8 * whole + thread; i < elements; i += threads) staged[place(i)] = block.x[i];
  FinishCopies();
  if (signs) {
    for (int i = thread; i < whole; i += threads) {
      uint32_t* const to = reinterpret_cast<uint32_t*>(staged + place(8 * i));
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int at = (8 * i + 2 * pair) % n;
        to[pair] ^= PairSigns(signs[at / 32], at % 32 / 2);
      }
    }
    for (int i = 8 * whole + thread; i < elements; i += threads)
      staged[place(i)] ^= static_cast<uint16_t>(SignBit(signs, i % n) << 15);
  }
  __syncthreads();
}

// kCount consecutive results, scaled and rounded, to `position` of a row, a multiple of kCount. Where `plain`, the row
// is aligned and there are no signs.
template <typename T, int kCount>
__device__ __forceinline__ void StoreResults(uint16_t* row, int position, const float (&v)[kCount], float scale,
                                             bool plain, const uint32_t* signs) {
  uint16_t* const to = row + position;
  if constexpr (kCount == 1) {
    uint32_t packed = Pack<T>(v[0] * scale, 0);
    if (signs) packed ^= SignBit(signs, position) << 15;
    *to = static_cast<uint16_t>(packed);
  } else {
    uint32_t packed[kCount / 2];
#pragma unroll
    for (int pair = 0; pair < kCount / 2; ++pair) {
      packed[pair] = Pack<T>(v[2 * pair] * scale, v[2 * pair + 1] * scale);
      if (!plain && signs) packed[pair] ^= PairSigns(signs[position / 32], position % 32 / 2 + pair);
    }
    if (!plain) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = static_cast<uint16_t>(packed[i / 2] >> 16 * (i % 2));
    } else if constexpr (kCount == 8) {
      *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    } else if constexpr (kCount == 4) {
      *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = packed[0];
    }
  }
}

// The lane's operand A: 16 rows of a matrix of signs from the row at `words` on, 16 columns from `column` on.
template <typename T>
__device__ __forceinline__ void LoadSigns(uint32_t (&a)[4], const uint32_t* words, int row_words, int column) {
  const uint32_t upper = words[ARow(Lane(), 0) * row_words + column / 32];
  const uint32_t lower = words[ARow(Lane(), 1) * row_words + column / 32];
  const int pair = column % 32 / 2 + AColumn(Lane(), 0, 0) / 2;
  a[0] = SignedOnes<T>(upper, pair), a[1] = SignedOnes<T>(lower, pair);
  a[2] = SignedOnes<T>(upper, pair + 4), a[3] = SignedOnes<T>(lower, pair + 4);
}

// Two pairs of sums as two bfloat16 each, hi + lo, which keep 16 of their bits: operands of a further product.
struct HiLo {
  uint32_t hi, lo;
  __device__ __forceinline__ HiLo(float a, float b) {
    hi = Pack<BF16>(a, b);
    lo = Pack<BF16>(a - __uint_as_float(hi << 16), b - __uint_as_float(hi & 0xffff0000u));
  }
};

}  // namespace jax_hadacore::cuda
