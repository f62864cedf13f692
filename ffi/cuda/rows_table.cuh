// rows_table.cuh: which kernel transforms rows of 2^bits elements. The launch table.
// Every choice keeps within 96 KiB of shared memory, which every architecture from sm_80 on gives a block.
#pragma once

#include <utility>

#include "kernels.h"
#include "long_rows.cuh"
#include "short_rows.cuh"

namespace jax_hadacore::cuda {

constexpr int kShortBits = 11;
constexpr int kLongBits = 15;

// LongRowsShape<bits, fragments a warp, parts of the exchange, blocks a multiprocessor, prefetch>
template <typename T, int kBits>
struct LongRowsChoice;
template <typename T>
struct LongRowsChoice<T, 12> : LongRowsShape<12, 4, 1, 6, true> {};
template <typename T>
struct LongRowsChoice<T, 13> : LongRowsShape<13, 4, 1, 3, true> {};
template <typename T>
struct LongRowsChoice<T, 14> : LongRowsShape<14, 8, 2, 2, true> {};
template <typename T>
struct LongRowsChoice<T, 15> : LongRowsShape<15, 8, 2, 1, true> {};
// A float32 row takes twice the registers: no room to load the next one.
template <>
struct LongRowsChoice<float, 12> : LongRowsShape<12, 4, 1, 6, false> {};
template <>
struct LongRowsChoice<float, 13> : LongRowsShape<13, 4, 1, 4, false> {};
template <>
struct LongRowsChoice<float, 14> : LongRowsShape<14, 8, 2, 2, false> {};
template <>
struct LongRowsChoice<float, 15> : LongRowsShape<15, 8, 2, 1, false> {};

template <typename In, typename Out, int kBits, bool kAligned>
Kernel MakeRowsKernel() {
  if constexpr (kBits <= kShortBits) {
    // Enough loads in flight; element by element, as few as a row takes, since each needs many registers.
    constexpr int kRow = kBits > 8 ? 1 << (kBits - 8) : 1, kFragments = kAligned ? Max(kRow, 4) : kRow;
    constexpr int kElements = kShortRowsThreads / 32 * kFragments * kFragment;
    return {"short rows",       reinterpret_cast<const void*>(&ShortRows<In, kBits, kFragments, kAligned>),
            kShortRowsThreads,  0,
            kElements >> kBits, 0};
  } else {
    using Shape = LongRowsChoice<In, kBits>;
    return {"long rows",
            reinterpret_cast<const void*>(&LongRows<In, Out, Shape, kAligned>),
            Shape::kThreads,
            Shape::kSharedBytes,
            1,
            Shape::kPrefetch && kAligned ? Shape::kBlocksPerProcessor : 0};
  }
}

template <typename In, typename Out, int kFirst, int... i>
Kernel FindRowsKernel(int bits, bool aligned, std::integer_sequence<int, i...>) {
  Kernel kernel{};
  ((bits == kFirst + i ? void(kernel = aligned ? MakeRowsKernel<In, Out, kFirst + i, true>()
                                               : MakeRowsKernel<In, Out, kFirst + i, false>())
                       : void()),
   ...);
  return kernel;
}

// A change of type (float32 results of 16-bit rows) is needed for the first pass of long rows only.
template <typename In, typename Out>
Kernel RowsKernel(int bits, bool aligned) {
  constexpr int kFirst = std::is_same_v<In, Out> ? 0 : kLongBits;
  return FindRowsKernel<In, Out, kFirst>(bits, aligned, std::make_integer_sequence<int, kLongBits - kFirst + 1>{});
}

}  // namespace jax_hadacore::cuda
