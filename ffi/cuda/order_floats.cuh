// order_floats.cuh: float32 rows of k * 2^m elements, k <= 28 and m <= 10, in one pass: the order in registers, column
// by column, then butterflies.
#pragma once

#include <utility>

#include "fragment.cuh"
#include "kernels.h"
#include "signs.cuh"

namespace jax_hadacore::cuda {

constexpr int kFloatThreads = 512;  // at most

// v with the sign of its place in the row.
__device__ __forceinline__ float Signed(float v, const uint32_t* signs, int at) {
  return __uint_as_float(__float_as_uint(v) ^ SignBit(signs, at) << 31);
}

// Multiplies a column, elements `stride` apart, by a matrix whose rows are at `entries`, in place. Four terms are
// summed one after the other, and such sums as a tree: the error grows with the number of additions that a term goes
// through.
__device__ __forceinline__ void MultiplyColumn(float* column, int stride, int order, const uint32_t* entries) {
  float x[kMostFloatOrder];
#pragma unroll
  for (int a = 0; a < kMostFloatOrder; ++a) x[a] = a < order ? column[a * stride] : 0;
#pragma unroll 1
  for (int row = 0; row < order; ++row, column += stride, entries += kMostFloatOrder) {
    float sums[8] = {};
#pragma unroll
    for (int a = 0; a < kMostFloatOrder; ++a) sums[a / 4] = fmaf(__uint_as_float(entries[a]), x[a], sums[a / 4]);
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

  for (int i = thread; i < rows << kBits; i += threads) {
    float* const column = staged + (i >> kBits) * n + (i & (kPower - 1));
    if (signs && !work.signs_last)
      for (int a = 0; a < order; ++a)
        column[a * kPower] = Signed(column[a * kPower], signs, a * kPower + (i & (kPower - 1)));
    MultiplyColumn(column, kPower, order, given.words);
  }
  __syncthreads();

  const typename Fragment<float>::Matrices<kBits> none;
  for (int at = thread / 32 * kElements; at < elements; at += threads / 32 * kElements) {
    float v[kFragments][kSlots];
    const bool inside = at + kElements <= elements;
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
      for (int s = 0; s < kSlots; ++s) {
        v[f][s] = fmaf(v[f][s], work.float_scale, v[f][s] * work.scale_rest);
        const int element = at + f * kFragment + 4 * Fragment<float>::Quad(s / 4) + s % 4;
        if (signs && work.signs_last) v[f][s] = Signed(v[f][s], signs, element % n);
      }
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
