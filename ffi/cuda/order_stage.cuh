// order_stage.cuh: what the kernels of rows whose length is no power of two share: a block's rows in shared memory, and
// results on their way out.
#pragma once

#include "fragment.cuh"
#include "kernels.h"
#include "signs.cuh"

namespace jax_hadacore::cuda {

// A block's rows.
struct Rows {
  const uint16_t* x;
  uint16_t* y;
  int n, count;

  __device__ __forceinline__ explicit Rows(const Work& work) : n(static_cast<int>(work.n)) {
    const int64_t first = blockIdx.x * work.per_block;
    x = static_cast<const uint16_t*>(work.x) + first * n;
    y = static_cast<uint16_t*>(work.y) + first * n;
    count = static_cast<int>(min(work.per_block, work.count - first));
  }
};

// Gives `count` elements of aligned rows, whose copies the thread has started, their signs, which are in `row_words`
// whole words. Blocks' threads are whole warps, so that those of 8 elements are always in the same place of a word.
template <typename Place>
__device__ __forceinline__ void SignCopies(uint16_t* staged, int count, unsigned row_words, const uint32_t* signs,
                                           const Place& place) {
  constexpr int kAtOnce = 4;
  const int step = 8 * static_cast<int>(blockDim.x);
  const unsigned further = static_cast<unsigned>(step) / 32 % row_words;
  unsigned next = threadIdx.x / 4 % row_words;
#pragma unroll 1
  for (int first = 8 * static_cast<int>(threadIdx.x); first < count; first += kAtOnce * step) {
    PackedSigns<8> of[kAtOnce];
#pragma unroll
    for (PackedSigns<8>& eight : of) {
      eight = PackedSigns<8>::In(signs[next], 8 * threadIdx.x);
      next += further;
      next = min(next, next - row_words);  // which is larger where it is negative
    }
    FinishCopies();  // after the signs have been asked for
    // What a thread has beyond the end it reads once more, and does not store.
    uint4* to[kAtOnce];
    uint4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int element = first + i * step;
      to[i] = reinterpret_cast<uint4*>(staged + place(element < count ? element : first));
      v[i] = *to[i];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * step < count)
        *to[i] =
            make_uint4(v[i].x ^ of[i].Pair(0), v[i].y ^ of[i].Pair(1), v[i].z ^ of[i].Pair(2), v[i].w ^ of[i].Pair(3));
  }
}

// Brings the rows to shared memory, element i to place(i), which keeps 8 aligned ones together; with their signs, where
// there are some that come first. Every thread signs what it has brought itself.
template <typename Place>
__device__ __forceinline__ void StageRows(uint16_t* staged, const Rows& rows, const Work& work, const uint32_t* signs,
                                          const Place& place) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int elements = rows.count * rows.n, whole = work.aligned ? elements / 8 * 8 : 0;  // copied 8 at a time
#pragma unroll 4
  for (int i = 8 * thread; i < whole; i += 8 * threads) StartCopy<0>(staged + place(i), rows.x + i);
  for (int i = whole + thread; i < elements; i += threads) staged[place(i)] = rows.x[i];
  const bool sign = signs && !work.signs_last, in_words = rows.n % 32 == 0;
  if (sign && in_words) SignCopies(staged, whole, static_cast<unsigned>(rows.n) / 32, signs, place);
  FinishCopies();
  if (sign) {
#pragma unroll 1
    for (int i = 8 * thread; !in_words && i < whole; i += 8 * threads) {
      uint32_t* const to = reinterpret_cast<uint32_t*>(staged + place(i));
      int at = i % rows.n;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        to[pair] ^= PackedSigns<2>::From(signs, at).Pair(0);
        if ((at += 2) == rows.n) at = 0;
      }
    }
#pragma unroll 1
    for (int i = whole + thread; i < elements; i += threads)
      staged[place(i)] ^= static_cast<uint16_t>(SignBit(signs, i % rows.n) << 15);
  }
  __syncthreads();
}

// kCount consecutive results, scaled and rounded, to a place in a row that is a multiple of kCount. kAligned: the row
// is aligned to 16 bytes.
template <typename T, bool kAligned, int kCount>
__device__ __forceinline__ void StoreResults(uint16_t* to, const float (&v)[kCount], float scale,
                                             PackedSigns<kCount> signs) {
  if constexpr (kCount == 1) {
    *to = static_cast<uint16_t>(Pack<T>(v[0] * scale, 0) ^ signs.Pair(0));
  } else {
    uint32_t packed[kCount / 2];
#pragma unroll
    for (int pair = 0; pair < kCount / 2; ++pair)
      packed[pair] = Pack<T>(v[2 * pair] * scale, v[2 * pair + 1] * scale) ^ signs.Pair(pair);
    if constexpr (!kAligned) {
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

// The lane's operand A, 16 rows of a matrix of signs, 16 columns at a time. Words come before they are needed.
template <typename T>
class SignsOfRows {
 public:
  __device__ __forceinline__ SignsOfRows(const uint32_t* words, int row_words)
      : next_(words + ARow(Lane(), 0) * row_words), below_(8 * row_words) {
    Load();
  }

  // Of the columns from a on.
  __device__ __forceinline__ void Next(uint32_t (&operand)[4], int a) {
    const int pair = AColumn(Lane(), 0, 0) / 2;
    if (a % 32 == 0) {
      upper_ = coming_[0] << (3 - pair), lower_ = coming_[1] << (3 - pair);
      Load();
    }
    const int shift = a % 32 == 0 ? 8 : 0;
    const uint32_t upper = upper_ << shift, lower = lower_ << shift;
    operand[0] = SignedOnes<T>(upper << 4), operand[1] = SignedOnes<T>(lower << 4);
    operand[2] = SignedOnes<T>(upper), operand[3] = SignedOnes<T>(lower);
  }

 private:
  // One word beyond the last is read, and not used.
  __device__ __forceinline__ void Load() {
    coming_[0] = next_[0], coming_[1] = next_[below_];
    ++next_;
  }

  const uint32_t* next_;
  int below_;
  uint32_t coming_[2], upper_, lower_;
};

}  // namespace jax_hadacore::cuda
