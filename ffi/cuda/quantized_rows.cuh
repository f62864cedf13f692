// quantized_rows.cuh: aligned 16-bit rows of 32 to 32768 elements whose results become codes: the transforms of
// short_rows.cuh and long_rows.cuh with other ends.
#pragma once

#include "codes.cuh"
#include "rows_table.cuh"

namespace jax_hadacore::cuda {

// Stores codes and scales of a warp's consecutive fragments, of which a lane's first element is the array's number
// `first`; those from `first + left` on are beyond the array. kGroups: a row has several scales.
template <int kBits, bool kGroups, int kFragments>
__device__ __forceinline__ void QuantizeFragments(float (&v)[kFragments][kSlots], const Work& work, int64_t first,
                                                  int left) {
  const Quantizer quantizer(work);
  const bool asymmetric = quantizer.asymmetric();
  Span spans[kFragments];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) v[f][s] *= work.float_scale;
    spans[f].Include(v[f], asymmetric);
  }
  const auto inside = [&](int f) { return f * kFragment < left; };
  Group groups[kFragments];
  if constexpr (kBits > 8 && !kGroups) {  // the warp's one row
    Span span[1] = {spans[0]};
#pragma unroll
    for (int f = 1; f < kFragments; ++f) span[0].Include(spans[f]);
    IncludeWarp(span, asymmetric);
    Group group[1];
    quantizer.FindGroups(
        group, span, [&](int) { return first >> kBits; }, [&](int) { return Lane() == 0 && inside(0); });
#pragma unroll
    for (int f = 0; f < kFragments; ++f) groups[f] = group[0];
  } else {
    const int group_bits = kGroups ? work.group_bits : kBits, lanes = 1 << (group_bits - 3);
    if (!kGroups && kBits == 8) {
      IncludeWarp(spans, asymmetric);
    } else {
      IncludeLanes(spans, lanes, asymmetric);
    }
    const bool stores = (Lane() & (lanes - 1)) == 0;
    quantizer.FindGroups(
        groups, spans, [&](int f) { return (first + f * kFragment) >> group_bits; },
        [&](int f) { return stores && inside(f); });
  }
  quantizer.ForCode<!kGroups>([&](auto encoder) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      if (inside(f)) encoder.Store(work.y, first + f * kFragment, v[f], groups[f]);
  });
}

template <typename T, typename Shape, bool kGroups>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerProcessor * 3 / 4)
    QuantizedShortRows(const Work work) {
  constexpr int kBits = Shape::kBits, kFragments = Shape::kFragments, kElements = kFragments * kFragment;
  static_assert(kBits >= 5, "a lane's elements are of one row and one group, and whole rows end with a group of lanes");
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = (blockIdx.x * Shape::kRowsPerBlock << kBits) + warp * kElements + kSlots * Lane();
  const int left = static_cast<int>(min((work.count << kBits) - first, int64_t{kElements}));
  const typename Fragment<T>::template Matrices<kBits, (kFragments > 2)> matrices;
  // What is beyond the array is taken from its beginning: its results go nowhere.
  const auto load = [&](Fragment<T>& fragment, int f) {
    const int64_t at = f * kFragment < left ? first + f * kFragment : 0;
    const uint4 q = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(work.x) + at);
    fragment.raw[0] = q.x, fragment.raw[1] = q.y, fragment.raw[2] = q.z, fragment.raw[3] = q.w;
  };

  WaitForPreviousLaunch();
  Fragment<T> fragments[kFragments];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) load(fragments[f], f);
  IssueLoads();
  if constexpr (kBits < 8) {
    bool unsafe = false;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) unsafe |= fragments[f].HasUnsafe();
    if (__any_sync(kWarp, unsafe)) {
      // One fragment after the other, as TransformCarefully does it.
#pragma unroll 1
      for (int f = 0; f < kFragments; ++f) {
        Fragment<T> fragment;
        load(fragment, f);
        float v[1][kSlots], alone[kSlots];
        const unsigned done = fragment.template UnsafeRows<kBits>();
        fragment.template TransformByButterflies<kBits>(alone);
        fragment.Zero(done);
        fragment.Transform(v[0], matrices);
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
          if (done) v[0][s] = alone[s];
        QuantizeFragments<kBits, kGroups>(v, work, first + f * kFragment, left - f * kFragment);
      }
      return;
    }
  }

  float v[kFragments][kSlots];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) fragments[f].Transform(v[f], matrices);
  if constexpr (kBits > 8) Butterflies(v);
  QuantizeFragments<kBits, kGroups>(v, work, first, left);
}

template <typename T, typename Shape, bool kGroups>
__global__ void __launch_bounds__(Shape::kThreads, BlocksToFit(Shape::kBlocksPerProcessor))
    QuantizedLongRows(const Work work) {
  TransformLongRows<T, Quantized<kGroups>, Shape, true, false>(work, nullptr);
}

template <typename T, bool kGroups, int kBits, int kFragments>
Kernel MakeQuantizedRowsKernel(ShortRowsShape<kBits, kFragments> shape) {
  const auto function = &QuantizedShortRows<T, ShortRowsShape<kBits, kFragments>, kGroups>;
  return KernelOf<T, true>(shape, "short rows to codes", reinterpret_cast<const void*>(function));
}

template <typename T, bool kGroups, int kBits, int kFragments, int kBlocks, typename E, typename R>
Kernel MakeQuantizedRowsKernel(LongRowsShape<kBits, kFragments, kBlocks, E, R> shape) {
  using Shape = LongRowsShape<kBits, kFragments, kBlocks, E, R>;
  const auto function = &QuantizedLongRows<T, Shape, kGroups>;
  Kernel kernel = KernelOf<T, true>(shape, "long rows to codes", reinterpret_cast<const void*>(function));
  kernel.shared_bytes = Shape::template kSharedBytesForCodes<typename Element<T>::Storage>;
  return kernel;
}

// The shapes, which are those for many rows unless codes want other ones: they take more registers and instructions.
// The longest row's exchange takes as much memory in one part as in two of their own, and gives a thread 4 elements of
// a row and not 2.
template <typename T, int kBits>
struct QuantizedChoice : Choice<typename RowsChoice<T, kBits>::Many> {};
template <typename T>
struct QuantizedChoice<T, 11> : Choice<Long<11, 4, 14, Exchange<1>>> {};
template <typename T>
struct QuantizedChoice<T, 15>
    : Choice<Long<15, 8, 1, Exchange<1>, Staged<2, 90, kAnyTurns>>, Long<15, 8, 1, Exchange<2>>> {};

template <typename T, int kBits>
Kernel MakeQuantizedRowsKernel(bool groups, int64_t shared_bytes) {
  using Row = QuantizedChoice<T, kBits>;
  if constexpr (kBits < kMostQuantizedBits)
    if (groups) return MakeQuantizedRowsKernel<T, true>(typename Row::Many{});
  const Kernel many = MakeQuantizedRowsKernel<T, false>(typename Row::Many{});
  return many.shared_bytes <= shared_bytes ? many : MakeQuantizedRowsKernel<T, false>(typename Row::Few{});
}

template <typename T, int... i>
Kernel QuantizedRowsKernel(int bits, bool groups, int64_t shared_bytes, std::integer_sequence<int, i...>) {
  Kernel kernel{};
  ((bits == kLeastQuantizedBits + i
        ? void(kernel = MakeQuantizedRowsKernel<T, kLeastQuantizedBits + i>(groups, shared_bytes))
        : void()),
   ...);
  return kernel;
}

template <typename T>
Kernel QuantizedRowsKernel(int bits, bool groups, int64_t shared_bytes) {
  constexpr int kCount = kMostQuantizedBits - kLeastQuantizedBits + 1;
  return QuantizedRowsKernel<T>(bits, groups, shared_bytes, std::make_integer_sequence<int, kCount>{});
}

}  // namespace jax_hadacore::cuda
