// quantized_rows.cuh: aligned 16-bit rows of 32 to 32768 elements whose results become codes: the transforms of
// short_rows.cuh, up to 2048, and long_rows.cuh with other ends.
#pragma once

#include "codes.cuh"
#include "rows_table.cuh"

namespace jax_hadacore::cuda {

// Stores codes and scales of a warp's consecutive fragments of sums, of which a lane's first element is the array's
// number `first`; of rows up to a fragment, `inside` of a lane's fragments are in the array, of others all. May stop,
// and says so, before anything is stored, where a result is as large as those of rows with something unsafe.
template <int kBits, Formats kFormats, bool kMayStop, int kFragments>
__device__ __forceinline__ bool QuantizeFragments(const float (&sums)[kFragments][kSlots], const Work& work,
                                                  int64_t first, int inside = kFragments) {
  bool stopped = false;
  ForFormat<kFormats>(work, [&](auto quantizer) {
    Results<kSlots> results[kFragments];
    Span spans[kFragments];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) spans[f] = quantizer.Keep(results[f], sums[f]);
    if constexpr (kMayStop) {
      const float least = Fragment<BF16>::kLeastOfUnsafe * fabsf(work.float_scale);
      bool unsafe = false;
#pragma unroll
      for (const Span& span : spans) unsafe |= !(MaxOrNan(span.above, span.below) < least);
      if (__any_sync(kWarp, unsafe)) {
        stopped = true;
        return;
      }
    }
    Group groups[kFragments];
    if constexpr (kBits > 8 && kFormats == Formats::kOfRows) {
      constexpr int kOfRow = (1 << kBits) / kFragment, kRows = kFragments / kOfRow;
      Span span[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int f = 0; f < kOfRow; ++f) quantizer.Include(span[row], spans[row * kOfRow + f]);
        quantizer.IncludeAll(span[row]);
      }
      Group group[kRows];
      quantizer.FindGroups(
          group, span, [&](int row) { return (first >> kBits) + row; }, [](int) { return Lane() == 0; });
#pragma unroll
      for (int f = 0; f < kFragments; ++f) groups[f] = group[f / kOfRow];
    } else {
      const int group_bits = kFormats == Formats::kOfRows ? kBits : work.group_bits;
      const int64_t first_group = first >> group_bits;
      quantizer.FindGroupsOfLanes(
          groups, spans, 1 << (group_bits - 3), [&](int f) { return first_group + (f * kFragment >> group_bits); },
          [&](int f) { return f < inside; });
    }
    uint8_t* const codes = quantizer.Codes(first);
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      if (f < inside) quantizer.Store(codes + quantizer.Bytes(f * kFragment), results[f], groups[f]);
  });
  return stopped;
}

// Transforms a warp's whole rows, in kFragments fragments, to codes; x is where the lane's elements begin. May stop as
// QuantizeFragments does.
template <typename T, int kBits, Formats kFormats, int kFragments, typename Matrices>
__device__ __forceinline__ bool TransformToCodes(const uint4* x, const Work& work, int64_t first,
                                                 const Matrices& matrices) {
  Fragment<T> fragments[kFragments];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) fragments[f].LoadOwn(x + f * kFragment / kSlots);
  IssueLoads();
  float v[kFragments][kSlots];
  if constexpr (kBits <= 8) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) fragments[f].Transform(v[f], matrices);
  } else {  // a row's highest bit together with those of its fragments
    constexpr int kHalf = (1 << kBits) / kFragment / 2;
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      if (!(f & kHalf))
        Fragment<T>::TransformSumAndDifference(v[f], v[f + kHalf], fragments[f], fragments[f + kHalf], matrices);
    Butterflies<1, kHalf>(v);
  }
  return QuantizeFragments<kBits, kFormats, (kBits < 8)>(v, work, first);
}

// How many blocks of short rows are to fit on a multiprocessor: with 64 and 128 registers for a thread.
constexpr int ShortBlocksToFit(int fragments) { return BlocksToFit(64 / fragments); }

template <typename T, typename Shape, Formats kFormats>
__global__ void __launch_bounds__(Shape::kThreads, ShortBlocksToFit(Shape::kFragments))
    QuantizedShortRows(const Work work) {
  constexpr int kBits = Shape::kBits, kFragments = Shape::kFragments, kOfRow = Shape::kFragmentsOfRow;
  static_assert(kBits >= 5, "a lane's elements are of one row and one group, and whole rows end with a group of lanes");
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Shape::kRowsPerBlock;
  int64_t first = (first_row << kBits) + (warp * kFragments * kFragment + kSlots * Lane());
  const uint4* x = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(work.x) + first);
  const int64_t end = work.count << kBits;
  const typename Fragment<T>::template Matrices<kBits, true> matrices;

  WaitForPreviousLaunch();
  if (first - kSlots * Lane() + kFragments * kFragment <= end)
    if (!TransformToCodes<T, kBits, kFormats, kFragments>(x, work, first, matrices)) return;
  // The end of the array, or a row shows that it held something unsafe.
  if constexpr (kBits > 8) {
    if constexpr (kOfRow < kFragments) {
#pragma unroll 1
      for (; first < end; first += kOfRow * kFragment, x += kOfRow * kFragment / kSlots)
        TransformToCodes<T, kBits, kFormats, kOfRow>(x, work, first, matrices);
    }
  } else {
    // One fragment after the other, as TransformCarefully does it. The second of two is not inside.
    const typename Fragment<T>::template Matrices<kBits> matrices_again;
#pragma unroll 1
    for (int f = 0; f < kFragments; ++f) {
      const bool inside = first + f * kFragment < end;
      Fragment<T> fragment;
      fragment.LoadOwn(inside ? x + f * kFragment / kSlots : static_cast<const uint4*>(work.x));
      float v[2][kSlots] = {};
      if constexpr (kBits < 8) {
        const unsigned done = fragment.template UnsafeRows<kBits>();
        fragment.template TransformByButterflies<kBits>(v[1]);
        fragment.Zero(done);
        fragment.Transform(v[0], matrices_again);
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
          if (done) v[0][s] = v[1][s];
      } else {
        fragment.Transform(v[0], matrices_again);
      }
      QuantizeFragments<kBits, kFormats, false>(v, work, first + f * kFragment, inside);
    }
  }
}

template <typename T, typename Shape, Formats kFormats>
__global__ void __launch_bounds__(Shape::kThreads, BlocksToFit(Shape::kBlocksPerProcessor))
    QuantizedLongRows(const Work work) {
  TransformLongRows<T, Quantized<kFormats>, Shape, true, false>(work, nullptr);
}

template <typename T, Formats kFormats, int kBits, int kFragments>
Kernel MakeQuantizedRowsKernel(ShortRowsShape<kBits, kFragments> shape) {
  const auto function = &QuantizedShortRows<T, ShortRowsShape<kBits, kFragments>, kFormats>;
  return KernelOf<T, true>(shape, "short rows to codes", reinterpret_cast<const void*>(function));
}

template <typename T, Formats kFormats, int kBits, int kFragments, int kBlocks, typename E, typename R>
Kernel MakeQuantizedRowsKernel(LongRowsShape<kBits, kFragments, kBlocks, E, R> shape) {
  using Shape = LongRowsShape<kBits, kFragments, kBlocks, E, R>;
  const auto function = &QuantizedLongRows<T, Shape, kFormats>;
  Kernel kernel = KernelOf<T, true>(shape, "long rows to codes", reinterpret_cast<const void*>(function));
  kernel.shared_bytes = Shape::template kSharedBytesForCodes<typename Element<T>::Storage>;
  return kernel;
}

// The shapes, which are those for many rows unless codes want other ones (docs/kernel.md). The longest row's exchange
// takes as much memory in one part as in two of their own, and gives a thread 4 elements of a row and not 2.
template <typename T, int kBits, Formats kFormats>
struct QuantizedChoice : Choice<std::conditional_t<(kBits <= 10), Short<kBits, kFormats == Formats::kFloat4 ? 8 : 4>,
                                                   typename RowsChoice<T, kBits>::Many>> {};
template <typename T, Formats kFormats>
struct QuantizedChoice<T, 11, kFormats> : Choice<Short<11, 8>> {};
template <typename T, Formats kFormats>
struct QuantizedChoice<T, 12, kFormats> : Choice<Long<12, 8, 10, Exchange<1>>> {};
template <typename T, Formats kFormats>
struct QuantizedChoice<T, 13, kFormats> : Choice<Long<13, 8, 5, Exchange<1>>> {};
template <typename T, Formats kFormats>
struct QuantizedChoice<T, 15, kFormats>
    : Choice<Long<15, 8, 1, Exchange<1>, Staged<2, 90, kAnyTurns>>, Long<15, 8, 1, Exchange<2>>> {};

template <typename T, int kBits>
Kernel MakeQuantizedRowsKernel(Formats formats, int64_t shared_bytes) {
  return KernelFor(formats, [&](auto known) {
    using Row = QuantizedChoice<T, kBits, known()>;
    if constexpr (known() != Formats::kOfRows && kBits == kMostQuantizedBits) {
      return Kernel{};
    } else {
      const Kernel many = MakeQuantizedRowsKernel<T, known()>(typename Row::Many{});
      return many.shared_bytes <= shared_bytes ? many : MakeQuantizedRowsKernel<T, known()>(typename Row::Few{});
    }
  });
}

template <typename T, int... i>
Kernel QuantizedRowsKernel(int bits, Formats formats, int64_t shared_bytes, std::integer_sequence<int, i...>) {
  Kernel kernel{};
  ((bits == kLeastQuantizedBits + i
        ? void(kernel = MakeQuantizedRowsKernel<T, kLeastQuantizedBits + i>(formats, shared_bytes))
        : void()),
   ...);
  return kernel;
}

template <typename T>
Kernel QuantizedRowsKernel(int bits, Formats formats, int64_t shared_bytes) {
  constexpr int kCount = kMostQuantizedBits - kLeastQuantizedBits + 1;
  return QuantizedRowsKernel<T>(bits, formats, shared_bytes, std::make_integer_sequence<int, kCount>{});
}

}  // namespace jax_hadacore::cuda
