// shared.cuh: butterflies in shared memory, for vectors of any stride: rows of doubles, and the columns of long rows.
#pragma once

#include "fragment.cuh"
#include "kernels.h"

namespace jax_hadacore::cuda {

constexpr int kSharedThreads = 256;

// A sum, scaled. The rest of a scale is for finite sums: infinity times 0 is NaN.
__device__ __forceinline__ float Scaled(float sum, const Work& work) {
  return work.scale_rest == 0 ? sum * work.float_scale : fmaf(sum, work.float_scale, sum * work.scale_rest);
}

// Shared memory holds a block's vectors in the order of their addresses, so that loads and stores are coalesced and one
// loop of butterflies serves rows (whose elements are 1 apart) and columns (whose elements are per_block apart).
template <typename A, typename Out>
__global__ void __launch_bounds__(kSharedThreads) Shared(const Work work) {
  extern __shared__ float4 shared_memory[];
  A* tile = reinterpret_cast<A*>(shared_memory);
  const A* x = static_cast<const A*>(work.x);
  auto* y = static_cast<typename Element<Out>::Storage*>(work.y);
  const A scale = static_cast<A>(work.scale);

  const int64_t first = blockIdx.x * work.per_block;
  const int count = static_cast<int>(min(work.per_block, work.count - first) * work.n);
  const int step = work.stride == 1 ? 1 : static_cast<int>(work.per_block);
  const int64_t origin = first / work.stride * work.stride * work.n + first % work.stride;
  const auto address = [&](int i) { return origin + i / step * work.stride + i % step; };

  WaitForPreviousLaunch();
  for (int i = threadIdx.x; i < count; i += kSharedThreads) tile[i] = x[address(i)];
  for (int h = step; h < step * work.n; h *= 2) {
    __syncthreads();
    for (int pair = threadIdx.x; pair < count / 2; pair += kSharedThreads) {
      const int i = pair / h * 2 * h + pair % h;
      const A a = tile[i], b = tile[i + h];
      tile[i] = a + b;
      tile[i + h] = a - b;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kSharedThreads) {
    if constexpr (sizeof(A) == sizeof(float)) {
      y[address(i)] = Element<Out>::Round(Scaled(tile[i], work));
    } else {
      y[address(i)] = tile[i] * scale;
    }
  }
}

template <typename A, typename Out>
Kernel SharedKernel(int64_t n) {
  return {"shared", reinterpret_cast<const void*>(&Shared<A, Out>), kSharedThreads,
          static_cast<int>(kSharedVector * sizeof(A)), kSharedVector / n};
}

}  // namespace jax_hadacore::cuda
