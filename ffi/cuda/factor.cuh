// factor.cuh: one factor of a row's length by plain sums, and signs alone: for what no fused kernel serves.
#pragma once

#include "fragment.cuh"
#include "kernels.h"
#include "signs.cuh"

namespace jax_hadacore::cuda {

constexpr int kFactorThreads = 256;
constexpr int kFactorColumns = 8;

template <typename In, typename A>
__device__ __forceinline__ A Widen(typename Element<In>::Storage v) {
  if constexpr (sizeof v == 2) {
    return Unpack<In>(v).x;
  } else {
    return static_cast<A>(v);
  }
}

// The entries of a row of the matrix: signs, or values of type A.
template <typename A, bool kValues>
struct Entries {
  const uint32_t* words;
  __device__ __forceinline__ A operator[](int i) const {
    if constexpr (kValues) {
      return reinterpret_cast<const A*>(words)[i];
    } else {
      return SignBit(words, i) ? A{-1} : A{1};
    }
  }
};

// The sum of entries[i] * v[i * kFactorColumns]. Eight terms are summed as a tree, eight such sums one after the other,
// and so what these give: the error grows with the number of additions that a term goes through.
template <typename A, bool kValues>
__device__ __forceinline__ A Dot(const Entries<A, kValues>& entries, const A* v, int count) {
  A total = 0;
  for (int i = 0; i < count; i += 64) {
    A of_64 = 0;
    for (int j = i; j < count && j < i + 64; j += 8) {
      A terms[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) terms[k] = j + k < count ? entries[j + k] * v[(j + k) * kFactorColumns] : 0;
      of_64 += ((terms[0] + terms[1]) + (terms[2] + terms[3])) + ((terms[4] + terms[5]) + (terms[6] + terms[7]));
    }
    total += of_64;
  }
  return total;
}

// Vectors of n elements, `stride` apart, as for Shared: `count` of them; their transforms' elements from work.order on,
// work.columns of them, as entries of type A. y may be x where these are all.
template <typename In, typename A, bool kValues>
__global__ void __launch_bounds__(kFactorThreads)
    MultiplyFactor(const __grid_constant__ WorkAndWords<kManyWords> given) {
  const Work& work = given.work;
  const uint32_t* const words = Generic(given.words);
  extern __shared__ float4 shared_memory[];
  A* const tile = reinterpret_cast<A*>(shared_memory);
  const auto* x = static_cast<const typename Element<In>::Storage*>(work.x);
  A* const y = static_cast<A*>(work.y);

  const int column = static_cast<int>(threadIdx.x) % kFactorColumns, n = static_cast<int>(work.n);
  const int row = static_cast<int>(threadIdx.x) / kFactorColumns;
  constexpr int kRows = kFactorThreads / kFactorColumns;
  const int64_t vector = blockIdx.x * int64_t{kFactorColumns} + column;
  const int64_t origin = vector / work.stride * work.stride * n + vector % work.stride;
  const int row_words = kValues ? n * static_cast<int>(sizeof(A) / sizeof(uint32_t)) : static_cast<int>(SignWords(n));

  WaitForPreviousLaunch();
  if (vector < work.count)
    for (int i = row; i < n; i += kRows) tile[i * kFactorColumns + column] = Widen<In, A>(x[origin + i * work.stride]);
  __syncthreads();
  if (vector < work.count)
    for (int i = row; i < work.columns; i += kRows) {
      const Entries<A, kValues> entries = {words + i * row_words};
      y[origin + (work.order + i) * work.stride] = Dot(entries, tile + column, n);
    }
}

// Of rows of n elements those from work.order on, work.columns of them, each with its sign.
template <typename T>
__global__ void __launch_bounds__(kFactorThreads) ApplySigns(const __grid_constant__ WorkAndWords<kManyWords> given) {
  const Work& work = given.work;
  const uint32_t* const signs = work.device_signs ? work.device_signs : Generic(given.words);
  const T* const x = static_cast<const T*>(work.x);
  T* const y = static_cast<T*>(work.y);
  WaitForPreviousLaunch();
  const int64_t first = blockIdx.x * work.per_block, last = min(work.count, first + work.per_block);
  for (int64_t i = first + threadIdx.x; i < last; i += kFactorThreads) {
    const int at = static_cast<int>(i % work.columns);
    const int64_t element = i / work.columns * work.n + work.order + at;
    if constexpr (sizeof(T) == 2) {
      y[element] = static_cast<T>(x[element] ^ SignBit(signs, at) << 15);
    } else {
      y[element] = SignBit(signs, at) ? -x[element] : x[element];
    }
  }
}

template <typename In, typename A>
Kernel FactorKernel(int64_t order, bool values) {
  const auto function = values ? &MultiplyFactor<In, A, true> : &MultiplyFactor<In, A, false>;
  Kernel kernel = {"factor", reinterpret_cast<const void*>(function), kFactorThreads,
                   static_cast<int>(order) * kFactorColumns * static_cast<int>(sizeof(A)), kFactorColumns};
  kernel.words = kManyWords;
  return kernel;
}

template <typename T>
Kernel SignsKernel() {
  Kernel kernel = {"signs", reinterpret_cast<const void*>(&ApplySigns<T>), kFactorThreads, 0, 4 * kFactorThreads};
  kernel.words = kManyWords;
  return kernel;
}

}  // namespace jax_hadacore::cuda
