// rows_table.cuh: which kernels transform rows of 2^bits elements. The launch table, as measured (docs/kernel.md).
#pragma once

#include <type_traits>
#include <utility>

#include "kernels.h"
#include "long_rows.cuh"
#include "short_rows.cuh"

namespace jax_hadacore::cuda {

// For each type and length the kernel for many rows, which keeps enough loads in flight to saturate the memory, and the
// kernel for few, which ends soonest. For up to kSplitElements a multiprocessor two blocks to a row end sooner still.
template <typename Many_, typename Few_ = Many_, typename Split_ = void, int kSplitElements_ = 0>
struct Choice {
  using Many = Many_;
  using Few = Few_;
  using Split = Split_;
  static constexpr int kSplitElements = kSplitElements_;
};

template <int kBits, int kFragments>
using Short = ShortRowsShape<kBits, kFragments>;
// <bits, fragments a warp, blocks a multiprocessor, exchange, rows>
template <int kBits, int kFragments, int kBlocks, typename Exchange, typename Rows = Direct>
using Long = LongRowsShape<kBits, kFragments, kBlocks, Exchange, Rows>;

constexpr int kAnyTurns = 1 << 30;

template <typename T, int kBits>
struct RowsChoice : Choice<Short<kBits, 2>, Short<kBits, 1>> {};
template <typename T>
struct RowsChoice<T, 9> : Choice<Short<9, 2>> {};
template <typename T>
struct RowsChoice<T, 10> : Choice<Short<10, 4>, Long<10, 2, 16, Exchange<1>, Staged<1>>> {};
template <typename T>
struct RowsChoice<T, 11> : Choice<Long<11, 4, 12, Exchange<1>>, Long<11, 2, 8, Exchange<1>>> {};
template <typename T>
struct RowsChoice<T, 12>
    : Choice<Long<12, 4, 8, Exchange<1>>, Long<12, 4, 8, Exchange<1>>, Long<12, 2, 8, Exchange<1>, Split>, 2048> {};
template <typename T>
struct RowsChoice<T, 13>
    : Choice<Long<13, 4, 4, Exchange<1>>, Long<13, 4, 4, Exchange<1>>, Long<13, 4, 4, Exchange<1>, Split>, 16384> {};
template <typename T>
struct RowsChoice<T, 14> : Choice<Long<14, 8, 2, Exchange<1>, Staged<2, 75, 16>>, Long<14, 8, 2, Exchange<1>>,
                                  Long<14, 4, 2, Exchange<1>, Split>, 16384> {};
template <typename T>
struct RowsChoice<T, 15> : Choice<Long<15, 8, 1, Exchange<2, true>, Staged<2, 90, kAnyTurns>>,
                                  Long<15, 8, 1, Exchange<2>>, Long<15, 8, 2, Exchange<1>, Split>, 16384> {};
template <typename T>
struct RowsChoice<T, 16> : Choice<void, void, Long<16, 8, 1, Exchange<1>, Split>> {};  // launch.cc says when

// A float32 row takes twice the registers as it comes, and twice the shared memory where it is staged.
template <int kBits>
struct RowsChoice<float, kBits> : Choice<Short<kBits, 1>> {};
template <>
struct RowsChoice<float, 9> : Choice<Short<9, 2>> {};
template <>
struct RowsChoice<float, 10> : Choice<Short<10, 4>, Long<10, 2, 16, Exchange<1>>> {};
template <>
struct RowsChoice<float, 11> : Choice<Long<11, 4, 12, Exchange<1>>> {};
template <>
struct RowsChoice<float, 12> : Choice<Long<12, 4, 6, Exchange<1>>> {};
template <>
struct RowsChoice<float, 13> : Choice<Long<13, 4, 3, Exchange<1>>> {};
template <>
struct RowsChoice<float, 14> : Choice<Long<14, 8, 2, Exchange<2>, Staged<2>>> {};
template <>
struct RowsChoice<float, 15>
    : Choice<Long<15, 8, 1, Exchange<2>, Staged<2, 85, kAnyTurns>>, Long<15, 8, 1, Exchange<2>>> {};

// A kernel of that shape.
template <typename T, bool kAligned, int kBits, int kFragments>
Kernel KernelOf(ShortRowsShape<kBits, kFragments>, const char* name, const void* function) {
  using Shape = ShortRowsShape<kBits, kFragments>;
  return {name, function, Shape::kThreads, 0, Shape::kRowsPerBlock};
}

template <typename T, bool kAligned, int kBits, int kFragments, int kBlocks, typename E, typename R>
Kernel KernelOf(LongRowsShape<kBits, kFragments, kBlocks, E, R>, const char* name, const void* function) {
  using Shape = LongRowsShape<kBits, kFragments, kBlocks, E, R>;
  constexpr int kShared = Shape::template kSharedBytes<typename Element<T>::Storage, kAligned>;
  Kernel kernel = {name, function, Shape::kThreads, kShared, 1, Shape::kBlocksPerRow, kBlocks};
  if (Shape::template kStaged<kAligned>) {
    kernel.most_rows = R::kMostRows;
    kernel.run_percent = R::kRunPercent;
    kernel.most_turns = R::kMostTurns;
  }
  return kernel;
}

template <typename In, typename Out, bool kAligned, int kBits, int kFragments>
Kernel MakeRowsKernel(ShortRowsShape<kBits, kFragments> shape) {
  const auto function = &ShortRows<In, ShortRowsShape<kBits, kFragments>, kAligned>;
  return KernelOf<In, kAligned>(shape, "short rows", reinterpret_cast<const void*>(function));
}

template <typename In, typename Out, bool kAligned, int kBits, int kFragments, int kBlocks, typename E, typename R>
Kernel MakeRowsKernel(LongRowsShape<kBits, kFragments, kBlocks, E, R> shape) {
  const auto function = &LongRows<In, Out, LongRowsShape<kBits, kFragments, kBlocks, E, R>, kAligned>;
  return KernelOf<In, kAligned>(shape, R::kSplit ? "halves of long rows" : "long rows",
                                reinterpret_cast<const void*>(function));
}

// The kernel of that shape which applies signs as well.
template <typename T, int kBits, int kFragments>
Kernel MakeSignedRowsKernel(ShortRowsShape<kBits, kFragments> shape) {
  const auto function = &SignedShortRows<T, ShortRowsShape<kBits, kFragments>>;
  Kernel kernel = KernelOf<T, true>(shape, "short rows with signs", reinterpret_cast<const void*>(function));
  kernel.words = static_cast<int>(SignWords(1 << kBits));
  return kernel;
}

template <typename T, int kBits, int kFragments, int kBlocks, typename E, typename R>
Kernel MakeSignedRowsKernel(LongRowsShape<kBits, kFragments, kBlocks, E, R> shape) {
  const auto function = &SignedLongRows<T, LongRowsShape<kBits, kFragments, kBlocks, E, R>>;
  Kernel kernel = KernelOf<T, true>(shape, "long rows with signs", reinterpret_cast<const void*>(function));
  kernel.words = static_cast<int>(SignWords(1 << kBits));
  return kernel;
}

// An unaligned row comes element by element, for which the kernel for few rows has to do.
template <typename In, typename Out, bool kAligned, int kBits>
RowsKernels MakeRowsKernels() {
  using Row = RowsChoice<In, kBits>;
  RowsKernels kernels{};
  if constexpr (!std::is_void_v<typename Row::Few>) {
    kernels.few = MakeRowsKernel<In, Out, kAligned>(typename Row::Few{});
    kernels.many = kernels.few;
    if constexpr (kAligned) kernels.many = MakeRowsKernel<In, Out, true>(typename Row::Many{});
  }
  if constexpr (!std::is_void_v<typename Row::Split>) {
    kernels.split = MakeRowsKernel<In, Out, kAligned>(typename Row::Split{});
    kernels.split_elements = Row::kSplitElements;
  }
  if constexpr (kAligned && std::is_same_v<In, Out> && !std::is_void_v<typename Row::Many>) {
    kernels.signed_rows = MakeSignedRowsKernel<In>(typename Row::Many{});
    kernels.signed_rows_anywhere = kernels.signed_rows;
    // The only ones of which that for many does not fit into any GPU's shared memory.
    if constexpr (kBits == 15) kernels.signed_rows_anywhere = MakeSignedRowsKernel<In>(typename Row::Few{});
  }
  return kernels;
}

template <typename In, typename Out, int kFirst, int... i>
RowsKernels FindRowsKernels(int bits, bool aligned, std::integer_sequence<int, i...>) {
  RowsKernels kernels{};
  ((bits == kFirst + i ? void(kernels = aligned ? MakeRowsKernels<In, Out, true, kFirst + i>()
                                                : MakeRowsKernels<In, Out, false, kFirst + i>())
                       : void()),
   ...);
  return kernels;
}

// A change of type (float32 results of 16-bit rows) is needed for the first pass of long rows only.
template <typename In, typename Out>
RowsKernels FindRowsKernels(int bits, bool aligned) {
  constexpr int kFirst = std::is_same_v<In, Out> ? 0 : 15,
                kLast = std::is_same_v<In, Out> && sizeof(typename Element<In>::Storage) == 2 ? 16 : 15;
  return FindRowsKernels<In, Out, kFirst>(bits, aligned, std::make_integer_sequence<int, kLast - kFirst + 1>{});
}

}  // namespace jax_hadacore::cuda
