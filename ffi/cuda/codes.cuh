// codes.cuh: the formats that a kernel to codes is compiled for, and a row that waits for its scales.
#pragma once

#include <cstdint>

#include "quantizer.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

// Calls function(Quantizer) for the format of a call, one of kFormats: scales that are given belong to rows, those of 8
// bits to groups.
template <Formats kFormats, typename F>
__device__ __forceinline__ void ForFormat(const Work& work, const F& function) {
  const auto call = [&](auto scale, auto code) { function(Quantizer<code(), scale()>(work)); };
  const auto for_code = [&](auto scale) {
    switch (work.code) {
      case Code::kInt8: return call(scale, Constant<Code::kInt8>{});
      case Code::kInt4: return call(scale, Constant<Code::kInt4>{});
      case Code::kFloat8E4M3: return call(scale, Constant<Code::kFloat8E4M3>{});
      default: return call(scale, Constant<Code::kFloat8E5M2>{});
    }
  };
  if constexpr (kFormats == Formats::kFloat4) {
    if (work.scale_type == Scale::kE4M3) {
      call(Constant<Scale::kE4M3>{}, Constant<Code::kFloat4E2M1>{});
    } else {
      call(Constant<Scale::kE8M0>{}, Constant<Code::kFloat4E2M1>{});
    }
  } else if (work.zero_points) {
    function(Quantizer<Code::kInt4, Scale::kFloat32, true>(work));
  } else if (work.scale_type == Scale::kFloat32) {
    for_code(Constant<Scale::kFloat32>{});
  } else if constexpr (kFormats == Formats::kOfRows) {
    for_code(Constant<Scale::kGiven>{});
  } else {
    call(Constant<Scale::kE8M0>{}, Constant<Code::kFloat8E4M3>{});
  }
}

// On the host: make(Constant<formats>), the kernel for these.
template <typename F>
Kernel KernelFor(Formats formats, const F& make) {
  switch (formats) {
    case Formats::kOfRows: return make(Constant<Formats::kOfRows>{});
    case Formats::kOfGroups: return make(Constant<Formats::kOfGroups>{});
    default: return make(Constant<Formats::kFloat4>{});
  }
}

// In place of an element type: results become codes.
template <Formats kFormats_>
struct Quantized {
  static constexpr Formats kFormats = kFormats_;
};
template <Formats kFormats>
struct Element<Quantized<kFormats>> {
  using Storage = uint8_t;
};
template <typename Out>
constexpr bool kIsQuantized = false;
template <Formats kFormats>
constexpr bool kIsQuantized<Quantized<kFormats>> = true;

// In place of what a kernel without codes does not have.
struct Nothing {};

// A thread's sums of a row until its scales are known: of every set a vector of kWidth for each of the block's kCount
// warps, kDistance apart. Neighbouring threads hold neighbouring vectors.
template <int kSets, int kCount, int kWidth, int kDistance>
class KeptRow {
 public:
  __device__ __forceinline__ void Keep(int set, const float (&sums)[kCount][kWidth]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums_[set * kCount + i][j] = sums[i][j];
  }

  // The row has one scale. For all threads of a block, which has shared memory for a span of each warp. The thread's
  // first result is the array's number `first`, and that of a set offset(set) behind it.
  template <typename Offset>
  __device__ __forceinline__ void StoreRow(const Work& work, int64_t row, int64_t first, Span* spans,
                                           const Offset& offset) const {
    ForFormat<Formats::kOfRows>(work, [&](auto quantizer) {
      const int thread = static_cast<int>(threadIdx.x);
      Results<kWidth> results[kVectors];
      Span span[1] = {quantizer.Keep(results[0], sums_[0])};
#pragma unroll
      for (int i = 1; i < kVectors; ++i) quantizer.Include(span[0], quantizer.Keep(results[i], sums_[i]));
      quantizer.IncludeAll(span[0]);
      if (thread % 32 == 0) spans[thread / 32] = span[0];
      __syncthreads();
#pragma unroll
      for (int warp = 0; warp < kCount; ++warp) quantizer.Include(span[0], spans[warp]);
      Group group[1];
      quantizer.FindGroups(group, span, [&](int) { return row; }, [&](int) { return thread == 0; });
      uint8_t* const codes = quantizer.Codes(first);
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        quantizer.Store(codes + quantizer.Bytes(OffsetOf(i, offset)), results[i], group[0]);
    });
  }

  // Every 2^group_bits elements have a scale, 2 to 32 vectors.
  template <Formats kFormats, typename Offset>
  __device__ __forceinline__ void StoreGroups(const Work& work, int64_t first, const Offset& offset) const {
    ForFormat<kFormats>(work, [&](auto quantizer) {
      Results<kWidth> results[kVectors];
      Span spans[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) spans[i] = quantizer.Keep(results[i], sums_[i]);
      Group groups[kVectors];
      const int64_t first_group = first >> work.group_bits;
      quantizer.FindGroupsOfLanes(
          groups, spans, (1 << work.group_bits) / kWidth,
          [&](int i) { return first_group + (OffsetOf(i, offset) >> work.group_bits); }, [](int) { return true; });
      uint8_t* const codes = quantizer.Codes(first);
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        quantizer.Store(codes + quantizer.Bytes(OffsetOf(i, offset)), results[i], groups[i]);
    });
  }

 private:
  static constexpr int kVectors = kSets * kCount;

  template <typename Offset>
  static __device__ __forceinline__ int OffsetOf(int vector, const Offset& offset) {
    return offset(vector / kCount) + vector % kCount * kDistance;
  }

  float sums_[kVectors][kWidth];
};

}  // namespace jax_hadacore::cuda
