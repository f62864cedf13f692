// short_rows.cuh: rows of at most 1024 elements, which never leave the registers of one warp.
#pragma once

#include "fragment.cuh"

namespace jax_hadacore::cuda {

// A warp owns kFragments consecutive fragments: whole rows, which may have several fragments. Then butterflies across
// these do the bits above the eighth.
template <int kBits_, int kFragments_>
struct ShortRowsShape {
  static constexpr int kBits = kBits_;
  static constexpr int kFragments = kFragments_;
  static constexpr int kThreads = kFragments > 2 ? 64 : 128;
  static constexpr int kBlocksPerProcessor = kFragments > 2 ? 16 : 0;  // 0: ptxas chooses well
  static constexpr int kRowsPerBlock = (kThreads / 32 * kFragments * kFragment) >> kBits;
  static constexpr int kFragmentsOfRow = Max(1, (1 << kBits) / kFragment);
  static_assert(kFragments % kFragmentsOfRow == 0, "a warp owns whole rows");
};

// The signs of a lane's slots, to apply before the transform or after it; neither where a kernel is not kSigned. Of
// fragments that hold whole rows all have the same.
template <typename T, typename Shape, bool kSigned_>
struct LaneSigns {
  static constexpr bool kSigned = kSigned_;
  static constexpr int kFragments = Shape::kBits > 8 ? Shape::kFragments : 1;
  typename Fragment<T>::Signs of[kFragments];
  bool first = false, last = false;

  __device__ __forceinline__ LaneSigns(const Work& work, const uint32_t* words) {
    if constexpr (kSigned) {
      const uint32_t* const signs = RowSigns(work, words);
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
        of[f] = Fragment<T>::template SlotSigns<Shape::kBits>(signs + f * kFragment / 32);
      first = !work.signs_last, last = work.signs_last;
    }
  }
};

// Rows of 2^kBits <= 256 elements, `count` elements in all, one fragment after the other: for the end of an array, for
// unaligned ones, and for a warp that holds something unsafe (Fragment::HasUnsafe).
template <typename T, int kBits, typename Matrices, typename Signs>
__device__ __forceinline__ void TransformCarefully(const typename Element<T>::Storage* x,
                                                   typename Element<T>::Storage* y, int64_t count, float scale,
                                                   const Matrices& matrices, const Signs& signs) {
#pragma unroll 1
  for (; count > 0; count -= kFragment, x += kFragment, y += kFragment) {
    const unsigned inside = Fragment<T>::SlotsBelow(count);
    const auto last = signs.last ? signs.of[0] : typename Fragment<T>::Signs{};
    Fragment<T> fragment;
    fragment.LoadSlots(x, inside);
    if (signs.first) fragment.Apply(signs.of[0]);
    float v[kSlots];
    unsigned done = 0;
    if constexpr (Fragment<T>::kMayBeUnsafe && kBits < 8) {
      done = fragment.template UnsafeRows<kBits>();
      fragment.template TransformByButterflies<kBits>(v);
      Fragment<T>::StoreSlots(y, v, scale, inside & done, last);
      fragment.Zero(done);
    }
    fragment.Transform(v, matrices);
    Fragment<T>::StoreSlots(y, v, scale, inside & ~done, last);
  }
}

// A warp's whole elements, all loaded before the first is transformed. False, with nothing stored, where rows that
// share a fragment have to be kept apart.
template <typename T, typename Shape, bool kAligned, typename Matrices, typename Signs>
__device__ __forceinline__ bool TransformWhole(const typename Element<T>::Storage* x, typename Element<T>::Storage* y,
                                               float scale, const Matrices& matrices, const Signs& signs) {
  constexpr int kFragments = Shape::kFragments;
  Fragment<T> fragments[kFragments];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if constexpr (kAligned) {
      fragments[f].Load(x + f * kFragment);
    } else {
      fragments[f].LoadSlots(x + f * kFragment, kAllSlots);
    }
  }
  if constexpr (Signs::kSigned) IssueLoads();
  if (signs.first)
#pragma unroll
    for (int f = 0; f < kFragments; ++f) fragments[f].Apply(signs.of[f % Signs::kFragments]);
  if constexpr (Shape::kBits < 8 && Fragment<T>::kMayBeUnsafe) {
    bool unsafe = false;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) unsafe |= fragments[f].HasUnsafe();
    if (__any_sync(kWarp, unsafe)) return false;
  }
  float v[kFragments][kSlots];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) fragments[f].Transform(v[f], matrices);
  if constexpr (Shape::kBits > 8) Butterflies(v);
  const auto store = [&](auto signs_of) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      if constexpr (kAligned) {
        Fragment<T>::Store(y + f * kFragment, v[f], scale, signs_of(f));
      } else {
        Fragment<T>::StoreSlots(y + f * kFragment, v[f], scale, kAllSlots, signs_of(f));
      }
    }
  };
  if (signs.last) {
    store([&](int f) { return signs.of[f % Signs::kFragments]; });
  } else {
    store([](int) { return typename Fragment<T>::Signs{}; });
  }
  return true;
}

// kAligned: x and y are aligned to 16 bytes. kSigned: the rows have signs; `words` are null where they have none.
template <typename T, typename Shape, bool kAligned, bool kSigned>
__device__ __forceinline__ void TransformShortRows(const Work& work, const uint32_t* words) {
  using Storage = typename Element<T>::Storage;
  constexpr int kBits = Shape::kBits, kElements = Shape::kFragments * kFragment;

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Shape::kRowsPerBlock;
  const int64_t first = (first_row << kBits) + warp * kElements;
  const Storage* x = static_cast<const Storage*>(work.x) + first;
  Storage* y = static_cast<Storage*>(work.y) + first;
  const typename Fragment<T>::template Matrices<kBits, (Shape::kFragments > 2)> matrices;

  WaitForPreviousLaunch();
  const LaneSigns<T, Shape, kSigned> signs(work, words);
  if constexpr (kBits > 8) {
    static_assert(Shape::kFragments == Shape::kFragmentsOfRow, "a warp has one row");
    if (first_row + warp < work.count) TransformWhole<T, Shape, kAligned>(x, y, work.float_scale, matrices, signs);
  } else {
    if (kAligned && first_row + Shape::kRowsPerBlock <= work.count)
      if (TransformWhole<T, Shape, kAligned>(x, y, work.float_scale, matrices, signs)) return;
    const int64_t count = min((work.count << kBits) - first, int64_t{kElements});
    TransformCarefully<T, kBits>(x, y, count, work.float_scale, matrices, signs);
  }
}

// The two are apart because __grid_constant__, which words need, costs the other registers.
template <typename T, typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerProcessor) ShortRows(const Work work) {
  TransformShortRows<T, Shape, kAligned, false>(work, nullptr);
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerProcessor)
    SignedShortRows(const __grid_constant__ WorkAndSigns<Shape::kBits> given) {
  TransformShortRows<T, Shape, true, true>(given.work, given.words);
}

}  // namespace jax_hadacore::cuda
