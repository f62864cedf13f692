// short_rows.cuh: rows of at most 1024 elements, which never leave the registers of one warp.
#pragma once

#include "fragment.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

// A warp owns kFragments consecutive fragments: several rows, or one of kFragments * 256 elements, in which butterflies
// across the fragments do the bits above the eighth.
template <int kBits_, int kFragments_>
struct ShortRowsShape {
  static constexpr int kBits = kBits_;
  static constexpr int kFragments = kFragments_;
  static constexpr int kThreads = kFragments > 2 ? 64 : 128;
  static constexpr int kBlocksPerProcessor = kFragments > 2 ? 16 : 0;  // 0: ptxas chooses well
  static constexpr int kRowsPerBlock = (kThreads / 32 * kFragments * kFragment) >> kBits;
  static_assert(kBits <= 8 || kFragments * kFragment == 1 << kBits, "a warp owns whole rows, or one long one");
};

// For a warp's elements among which something is unsafe (Fragment::HasUnsafe), one fragment after the other.
template <typename T, int kBits, typename Matrices>
__device__ __forceinline__ void TransformApart(const uint16_t* x, uint16_t* y, int64_t count, float scale,
                                               const Matrices& matrices) {
#pragma unroll 1
  for (; count > 0; count -= kFragment, x += kFragment, y += kFragment) {
    const unsigned inside = Fragment<T>::SlotsBelow(count);
    Fragment<T> fragment;
    fragment.LoadSlots(x, inside);
    const unsigned unsafe = fragment.template UnsafeRows<kBits>();
    float v[kSlots];
    fragment.template TransformByButterflies<kBits>(v);
    Fragment<T>::StoreSlots(y, v, scale, inside & unsafe);
    fragment.Zero(unsafe);
    fragment.Transform(v, matrices);
    Fragment<T>::StoreSlots(y, v, scale, inside & ~unsafe);
  }
}

// kAligned: x and y are aligned to 16 bytes.
template <typename T, typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerProcessor) ShortRows(const Work work) {
  using Storage = typename Element<T>::Storage;
  constexpr int kBits = Shape::kBits, kFragments = Shape::kFragments, kElements = kFragments * kFragment;

  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (Shape::kThreads / 32) + threadIdx.x / 32;
  const int64_t first = warp * kElements;
  const int64_t count = min((work.count << kBits) - first, int64_t{kElements});
  if (count <= 0) return;
  const bool fast = kAligned && count == kElements;
  const Storage* x = static_cast<const Storage*>(work.x) + first;
  Storage* y = static_cast<Storage*>(work.y) + first;
  const float scale = static_cast<float>(work.scale);
  const typename Fragment<T>::template Matrices<kBits> matrices;

  WaitForPreviousLaunch();
  Fragment<T> fragments[kFragments];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if (fast) {
      fragments[f].Load(x + f * kFragment);
    } else {
      fragments[f].LoadSlots(x + f * kFragment, Fragment<T>::SlotsBelow(count - f * kFragment));
    }
  }

  if constexpr (kBits < 8 && Fragment<T>::kMayBeUnsafe) {
    bool unsafe = false;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) unsafe |= fragments[f].HasUnsafe();
    if (__any_sync(kWarp, unsafe)) return TransformApart<T, kBits>(x, y, count, scale, matrices);
  }
  float v[kFragments][kSlots];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) fragments[f].Transform(v[f], matrices);
  if constexpr (kBits > 8) Butterflies(v);

#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if (fast) {
      Fragment<T>::Store(y + f * kFragment, v[f], scale);
    } else {
      Fragment<T>::StoreSlots(y + f * kFragment, v[f], scale, Fragment<T>::SlotsBelow(count - f * kFragment));
    }
  }
}

}  // namespace jax_hadacore::cuda
