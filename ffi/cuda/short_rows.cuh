// short_rows.cuh: rows of at most 2048 elements, which never leave the registers of one warp.
#pragma once

#include "fragment.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

constexpr int kShortRowsThreads = 128;

// A warp owns kFragments consecutive fragments: several rows, or one of kFragments * 256 elements, in which butterflies
// across the fragments do the bits above the eighth. kAligned: x and y are aligned to 16 bytes.
template <typename T, int kBits, int kFragments, bool kAligned>
__global__ void __launch_bounds__(kShortRowsThreads) ShortRows(const Work work) {
  using Storage = typename Element<T>::Storage;
  constexpr int kRow = kBits > 8 ? 1 << (kBits - 8) : 1;  // fragments in a row
  static_assert(kFragments % kRow == 0, "a warp owns whole rows");

  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kShortRowsThreads / 32) + threadIdx.x / 32;
  const int64_t first = warp * (kFragments * kFragment);
  const int64_t count = (work.count << kBits) - first;
  if (count <= 0) return;
  const bool fast = kAligned && count >= kFragments * kFragment;
  const Storage* x = static_cast<const Storage*>(work.x) + first;
  Storage* y = static_cast<Storage*>(work.y) + first;
  const float scale = static_cast<float>(work.scale);

  Fragment<T> fragments[kFragments];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if (fast) {
      fragments[f].Load(x + f * kFragment);
    } else {
      fragments[f].LoadSlowly(x + f * kFragment, count - f * kFragment);
    }
  }
  const typename Fragment<T>::template Matrices<kBits> matrices;
#pragma unroll
  for (int row = 0; row < kFragments; row += kRow) {
    float v[kRow][kSlots];
#pragma unroll
    for (int f = 0; f < kRow; ++f) fragments[row + f].template Transform<kBits>(v[f], matrices);
    Butterflies(v);
#pragma unroll
    for (int f = 0; f < kRow; ++f) {
      Storage* to = y + (row + f) * kFragment;
      if (fast) {
        Fragment<T>::Store(to, v[f], scale);
      } else {
        Fragment<T>::StoreSlowly(to, v[f], scale, count - (row + f) * kFragment);
      }
    }
  }
}

}  // namespace jax_hadacore::cuda
