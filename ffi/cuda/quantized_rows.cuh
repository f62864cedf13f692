// quantized_rows.cuh: aligned 16-bit rows of 32 to 32768 elements whose results become codes: the transforms of
// short_rows.cuh and long_rows.cuh with other ends.
#pragma once

#include "codes.cuh"
#include "rows_table.cuh"

namespace jax_hadacore::cuda {

// A fragment's float32 sums, of rows of 2^kBits elements that do not touch one another. `unsafe`: a lane holds what
// may spread (Fragment::HasUnsafe).
template <int kBits, typename Fragment, typename Matrices>
__device__ __forceinline__ void TransformApart(float (&v)[kSlots], Fragment& fragment, bool unsafe,
                                               const Matrices& matrices) {
  if (!unsafe) return fragment.Transform(v, matrices);
  float alone[kSlots];
  const unsigned done = fragment.template UnsafeRows<kBits>();
  fragment.template TransformByButterflies<kBits>(alone);
  fragment.Zero(done);
  fragment.Transform(v, matrices);
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    if (done >> s & 1) v[s] = alone[s];
}

// kGroups: a row has several scales.
template <typename T, typename Shape, bool kGroups>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerProcessor * 3 / 4)
    QuantizedShortRows(const Work work) {
  constexpr int kBits = Shape::kBits, kFragments = Shape::kFragments;
  static_assert(kBits >= 5, "a lane's elements are of one row and one group, and whole rows end with a group of lanes");
  const int lane = Lane(), warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = (blockIdx.x * Shape::kRowsPerBlock << kBits) + warp * kFragments * kFragment + kSlots * lane;
  const int64_t end = work.count << kBits;
  const typename Fragment<T>::template Matrices<kBits, (kFragments > 2)> matrices;

  WaitForPreviousLaunch();
  Fragment<T> fragments[kFragments];
  bool unsafe = false;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    const int64_t at = first + f * kFragment;
    const uint4 v =
        at < end ? *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(work.x) + at) : make_uint4(0, 0, 0, 0);
    uint32_t (&raw)[4] = fragments[f].raw;
    raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
    if constexpr (kBits < 8) unsafe |= fragments[f].HasUnsafe();
  }
  if constexpr (kBits < 8) unsafe = __any_sync(kWarp, unsafe);

  float v[kFragments][kSlots];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if constexpr (kBits < 8) {
      TransformApart<kBits>(v[f], fragments[f], unsafe, matrices);
    } else {
      fragments[f].Transform(v[f], matrices);
    }
  }
  if constexpr (kBits > 8) Butterflies(v);

  const Quantizer quantizer(work);
  const bool asymmetric = quantizer.asymmetric();
  Span spans[kFragments];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) v[f][s] *= work.float_scale;
    spans[f].Include(v[f], asymmetric);
  }
  const auto place = [&](int f) { return first + f * kFragment; };
  Group groups[kFragments];
  if constexpr (kBits > 8 && !kGroups) {  // the warp's one row
    Span span[1] = {spans[0]};
#pragma unroll
    for (int f = 1; f < kFragments; ++f) span[0].Include(spans[f]);
    IncludeWarp(span, asymmetric);
    Group group[1];
    quantizer.FindGroups(
        group, span, [&](int) { return first >> kBits; }, [&](int) { return lane == 0 && first < end; });
#pragma unroll
    for (int f = 0; f < kFragments; ++f) groups[f] = group[0];
  } else {
    const int group_bits = kGroups ? work.group_bits : kBits, lanes = 1 << (group_bits - 3);
    if (!kGroups && kBits == 8) {
      IncludeWarp(spans, asymmetric);
    } else {
      IncludeLanes(spans, lanes, asymmetric);
    }
    quantizer.FindGroups(
        groups, spans, [&](int f) { return place(f) >> group_bits; },
        [&](int f) { return (lane & (lanes - 1)) == 0 && place(f) < end; });
  }
  quantizer.ForCode<!kGroups>([&](auto encoder) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      if (place(f) < end) encoder.Store(work.y, place(f), v[f], groups[f]);
  });
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
