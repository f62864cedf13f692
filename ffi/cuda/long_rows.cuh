// long_rows.cuh: rows of 4096 to 32768 elements, which one block transforms with one exchange through shared memory.
#pragma once

#include "fragment.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

// The shape of a block: a row is kWarps chunks of kFragments fragments, one chunk a warp. The exchange goes in kParts
// parts, so that it needs only that part of a row's float32 sums in shared memory.
template <int kBits_, int kFragments_, int kParts_, int kBlocksPerProcessor_, bool kPrefetch_>
struct LongRowsShape {
  static constexpr int kBits = kBits_;
  static constexpr int kFragments = kFragments_;
  static constexpr int kParts = kParts_;
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;
  static constexpr bool kPrefetch = kPrefetch_;  // load the block's next row while it works on this one
  static constexpr int kWarps = (1 << kBits) / kFragment / kFragments;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSharedBytes = (1 << kBits) / kParts * static_cast<int>(sizeof(float));
  static_assert(kFragments % kParts == 0, "a part of the exchange is whole fragments");
};

// Where an element of the exchange is kept. Of its quad's index (a quad is 4 consecutive floats) bit 3 is folded into
// bit 0, so that the eight lanes of one 128-byte access, whose quads are 2 apart in the 16-bit layout, use all banks.
__device__ __forceinline__ int Swizzle(int element) { return element ^ (element >> 3 & 4); }

template <int kWidth>
__device__ __forceinline__ void LoadVector(float (&v)[kWidth], const float* from) {
  if constexpr (kWidth == 4) {
    const float4 q = *reinterpret_cast<const float4*>(from);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  } else {
    static_assert(kWidth == 2);
    const float2 q = *reinterpret_cast<const float2*>(from);
    v[0] = q.x, v[1] = q.y;
  }
}

// Whether there are registers to load a row while another is transformed. Elsewhere ptxas would spill some.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
constexpr bool kRoomToPrefetch = true;
#else
constexpr bool kRoomToPrefetch = false;
#endif

// A block owns work.per_block consecutive rows. kAligned: x and y are aligned to 16 bytes.
template <typename In, typename Out, typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerProcessor) LongRows(const Work work) {
  using InStorage = typename Element<In>::Storage;
  using OutStorage = typename Element<Out>::Storage;
  constexpr int kN = 1 << Shape::kBits, kWarps = Shape::kWarps, kFragments = Shape::kFragments;
  constexpr bool kPrefetch = Shape::kPrefetch && kAligned && kRoomToPrefetch;
  constexpr int kChunk = kFragments * kFragment;
  constexpr int kPart = kChunk / Shape::kParts;  // elements of a chunk in one part of the exchange
  constexpr int kPartFragments = kFragments / Shape::kParts;
  constexpr int kWidth = Min(4, kPart / Shape::kThreads);  // consecutive elements that a thread takes of every chunk
  constexpr int kSteps = kPart / kWidth / Shape::kThreads;
  static_assert(kSteps * kWidth * Shape::kThreads == kPart, "the threads share a part evenly");
  extern __shared__ float exchange[];

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const InStorage* x = static_cast<const InStorage*>(work.x);
  OutStorage* y = static_cast<OutStorage*>(work.y);
  const float scale = static_cast<float>(work.scale);
  int64_t row = blockIdx.x * work.per_block;
  const int64_t end = min(work.count, row + work.per_block);

  // Loads the warp's fragments of one part of a row.
  Fragment<In> fragments[kFragments];
  const auto load = [&](int64_t of, int part) {
#pragma unroll
    for (int i = 0; i < kPartFragments; ++i) {
      const int f = part * kPartFragments + i;
      const InStorage* from = x + of * kN + warp * kChunk + f * kFragment;
      if constexpr (kAligned) {
        fragments[f].Load(from);
      } else {
        fragments[f].LoadSlowly(from, kFragment);
      }
    }
  };
  const auto load_row = [&](int64_t of) {
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) load(of, part);
  };

  if (kPrefetch) load_row(row);
  const typename Fragment<In>::template Matrices<8> matrices;
  for (; row < end; ++row) {
    // The low bits: each warp its chunk, in registers.
    if (!kPrefetch) load_row(row);
    float v[kFragments][kSlots];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) fragments[f].template Transform<8>(v[f], matrices);
    Butterflies(v);

    // The bits above a chunk: each thread the same few elements of every chunk.
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kPartFragments; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* quad = &v[part * kPartFragments + i][4 * half];
          const int at = warp * kPart + i * kFragment + Swizzle(4 * Fragment<In>::Quad(half));
          *reinterpret_cast<float4*>(&exchange[at]) = make_float4(quad[0], quad[1], quad[2], quad[3]);
        }
      if (kPrefetch && row + 1 < end) load(row + 1, part);  // on its way while this row is finished
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = (step * Shape::kThreads + thread) * kWidth;
        float u[kWarps][kWidth];
#pragma unroll
        for (int chunk = 0; chunk < kWarps; ++chunk)
          LoadVector<kWidth>(u[chunk], &exchange[chunk * kPart + Swizzle(at)]);
        Butterflies(u);
        OutStorage* to = y + row * kN + part * kPart + at;
#pragma unroll
        for (int chunk = 0; chunk < kWarps; ++chunk) {
          if constexpr (kAligned) {
            Element<Out>::template Store<kWidth>(to + chunk * kChunk, u[chunk], scale);
          } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) to[chunk * kChunk + i] = Element<Out>::Round(u[chunk][i] * scale);
          }
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace jax_hadacore::cuda
