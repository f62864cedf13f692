// columns.cuh: the columns of (n, stride) tiles of float32 numbers, for short n: the second pass of rows longer than
// 32768, and float32 arrays whose last axis is another one.
#pragma once

#include "fragment.cuh"
#include "kernels.h"

namespace jax_hadacore::cuda {

constexpr int kColumnsThreads = 256;

template <int kBits_>
struct ColumnsShape {
  static constexpr int kN = 1 << kBits_;
  static constexpr int kWidth = ColumnsWidth(kBits_);  // neighbouring columns, which a thread holds in registers
  static constexpr int kColumnsPerBlock = kColumnsThreads * kWidth;
};

// What is left of the scale, less than a rounding, would cost too many registers.
template <typename Out, typename Shape>
__global__ void __launch_bounds__(kColumnsThreads) Columns(const Work work) {
  using Storage = typename Element<Out>::Storage;
  constexpr int kN = Shape::kN, kWidth = Shape::kWidth;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * Shape::kColumnsPerBlock + threadIdx.x * kWidth;
  if (column >= work.count) return;
  const int64_t origin = column / work.stride * work.stride * kN + column % work.stride;
  const float* x = static_cast<const float*>(work.x) + origin;
  Storage* y = static_cast<Storage*>(work.y) + origin;
  const float scale = work.float_scale;

  WaitForPreviousLaunch();
  float v[kN][kWidth];
#pragma unroll
  for (int i = 0; i < kN; ++i) LoadVector<kWidth>(v[i], x + i * work.stride);
  Butterflies(v);
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if constexpr (kWidth > 1) {
      Element<Out>::template Store<kWidth>(y + i * work.stride, v[i], scale);
    } else {
      y[i * work.stride] = Element<Out>::Round(v[i][0] * scale);
    }
  }
}

template <typename Out, int kBits>
Kernel MakeColumnsKernel() {
  using Shape = ColumnsShape<kBits>;
  return {"columns", reinterpret_cast<const void*>(&Columns<Out, Shape>), kColumnsThreads, 0, Shape::kColumnsPerBlock};
}

template <typename Out>
Kernel ColumnsKernel(int bits) {
  switch (bits) {
    case 1: return MakeColumnsKernel<Out, 1>();
    case 2: return MakeColumnsKernel<Out, 2>();
    case 3: return MakeColumnsKernel<Out, 3>();
    case 4: return MakeColumnsKernel<Out, 4>();
    case 5: return MakeColumnsKernel<Out, 5>();
    case 6: return MakeColumnsKernel<Out, 6>();
    default: return MakeColumnsKernel<Out, kColumnsBits>();
  }
}

}  // namespace jax_hadacore::cuda
