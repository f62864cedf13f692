// order_floats.cuh: float32 rows of k * 2^m elements, k <= 28 and m <= 10, in one pass: the order in registers, column
// by column, then butterflies.
#pragma once

#include <utility>

#include "fragment.cuh"
#include "kernels.h"
#include "signs.cuh"

namespace jax_hadacore::cuda {

constexpr int kFloatThreads = 512;  // at most

// Multiplies a column, elements kStride apart from `first` of a row on, by a matrix whose rows are at `entries`, in
// place; with their signs, unless these are null. Four terms are summed one after the other, and such sums as a tree:
// the error grows with the number of additions that a term goes through.
template <int kStride>
__device__ __forceinline__ void MultiplyColumn(float* row, int first, int order, const uint32_t* entries,
                                               const uint32_t* signs) {
  float* column = row + first;
  float x[kMostFloatOrder];
  if (signs) {
    // At strides of whole words all are in the same place of one.
    int back = 31 - BitOf(first);
    KeepOutOfRegisters(back);
#pragma unroll
    for (int a = 0; a < kMostFloatOrder; ++a) {
      x[a] = 0;
      if (a < order) {
        const int at = first + a * kStride % 32, shift = kStride % 32 ? 31 - BitOf(at) : back;
        const uint32_t sign = signs[a * kStride / 32 + at / 32] << shift & 0x80000000u;
        x[a] = __uint_as_float(__float_as_uint(column[a * kStride]) ^ sign);
      }
    }
  } else {
#pragma unroll
    for (int a = 0; a < kMostFloatOrder; ++a) x[a] = a < order ? column[a * kStride] : 0;
  }
#pragma unroll 1
  for (int a = 0; a < order; ++a, column += kStride, entries += kMostFloatOrder) {
    float sums[8] = {};
#pragma unroll
    for (int b = 0; b < kMostFloatOrder; ++b) sums[b / 4] = fmaf(__uint_as_float(entries[b]), x[b], sums[b / 4]);
    *column = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
}

// A warp transforms fragments of 256 elements: rows of 2^kBits, or 2^(kBits - 8) fragments to a row.
template <int kBits>
__global__ void __launch_bounds__(kFloatThreads, 2)
    OrderFloats(const __grid_constant__ WorkAndWords<kManyWords> given) {
  constexpr int kPower = 1 << kBits, kFragments = Max(kPower / kFragment, 1), kElements = kFragments * kFragment;
  const Work& work = given.work;
  const uint32_t* const signs = SignsOf(work, given.words);
  extern __shared__ float4 shared_memory[];
  float* const staged = reinterpret_cast<float*>(shared_memory);

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x),
            n = static_cast<int>(work.n), order = work.order;
  const int64_t first = blockIdx.x * work.per_block;
  const int rows = static_cast<int>(min(work.per_block, work.count - first)), elements = rows * n;
  const float* const x = static_cast<const float*>(work.x) + first * n;
  float* const y = static_cast<float*>(work.y) + first * n;

  WaitForPreviousLaunch();
  const int whole = work.aligned ? elements / 4 * 4 : 0;
#pragma unroll 4
  for (int i = 4 * thread; i < whole; i += 4 * threads) StartCopy<0>(staged + i, x + i);
  for (int i = whole + thread; i < elements; i += threads) staged[i] = x[i];
  FinishCopies();
  __syncthreads();

  for (int i = thread; i < rows << kBits; i += threads)
    MultiplyColumn<kPower>(staged + (i >> kBits) * n, i & (kPower - 1), order, given.words,
                           work.signs_last ? nullptr : signs);
  __syncthreads();

  const typename Fragment<float>::Matrices<kBits> none;
  for (int at = thread / 32 * kElements; at < elements; at += threads / 32 * kElements) {
    float v[kFragments][kSlots];
    const bool inside = at + kElements <= elements;
    const bool sign = signs && work.signs_last;
    Fragment<float>::Signs last[kFragments];
    if (sign) {
      const unsigned place = at % n;  // where a row is several fragments, all of them are in it
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned quad = place + f * kFragment + 4 * Fragment<float>::Quad(half);
          if constexpr (kBits < 2) {  // a row may end among the four
#pragma unroll
            for (int i = 0; i < 4; ++i) last[f].of_half[half].word |= SignBit(signs, (quad + i) % n) << (14 + BitOf(i));
          } else {
            last[f].of_half[half] = PackedSigns<4>::From(signs, kBits < 8 ? quad % n : quad);
          }
        }
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      Fragment<float> fragment;
      if (inside) {
        fragment.Load(staged + at + f * kFragment);
      } else {
        fragment.LoadSlots(staged + at + f * kFragment, Fragment<float>::SlotsBelow(elements - at - f * kFragment));
      }
      fragment.Transform(v[f], none);
    }
    if constexpr (kBits > 8) Butterflies(v);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      float* const to = y + at + f * kFragment;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) v[f][s] = fmaf(v[f][s], work.float_scale, v[f][s] * work.scale_rest);
      if (sign)
#pragma unroll
        for (int s = 0; s < kSlots; ++s) v[f][s] = last[f].of_half[s / 4].Apply(v[f][s], s % 4);
      if (inside && work.aligned) {
        Fragment<float>::Store(to, v[f], 1);
      } else {
        Fragment<float>::StoreSlots(to, v[f], 1, Fragment<float>::SlotsBelow(elements - at - f * kFragment));
      }
    }
  }
}

template <int... kBits>
Kernel FindOrderFloatsKernel(int bits, std::integer_sequence<int, kBits...>) {
  Kernel kernel{};
  ((bits == kBits ? void(kernel = {"order rows", reinterpret_cast<const void*>(&OrderFloats<kBits>), kFloatThreads, 0})
                  : void()),
   ...);
  kernel.words = kManyWords;
  return kernel;
}

}  // namespace jax_hadacore::cuda
