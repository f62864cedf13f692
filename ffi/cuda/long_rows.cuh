// long_rows.cuh: rows that one block transforms with one exchange through shared memory: those of 2048 to 32768
// elements, and of 1024 where there are few.
#pragma once

#include "fragment.cuh"
#include "work.h"

namespace jax_hadacore::cuda {

// Of the exchange's buffers: how many parts it goes in, each of which needs only that part of a row's float32 sums in
// shared memory, and whether every part has a buffer of its own, which saves a barrier.
template <int kParts_, bool kOwnBuffers_ = false>
struct Exchange {
  static constexpr int kParts = kParts_;
  static constexpr bool kOwnBuffers = kOwnBuffers_ || kParts == 1;
};

// How a row comes: straight into registers, or staged in shared memory, where the block's next row waits while it works
// on this one. Such a block takes up to kMostRows consecutive rows.
template <int kMostRows_ = 0>
struct Staged {
  static constexpr int kMostRows = kMostRows_;
};
using Direct = Staged<>;

// The shape of a block: a row is kWarps chunks of kFragments fragments, one chunk a warp.
template <int kBits_, int kFragments_, int kBlocksPerProcessor_, typename Exchange, typename Rows = Direct>
struct LongRowsShape {
  static constexpr int kBits = kBits_;
  static constexpr int kFragments = kFragments_;
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;
  static constexpr int kParts = Exchange::kParts;
  static constexpr bool kOwnBuffers = Exchange::kOwnBuffers;
  static constexpr int kMostRows = Rows::kMostRows;
  static constexpr int kWarps = (1 << kBits) / kFragment / kFragments;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBuffer = (1 << kBits) / kParts;                       // floats
  static constexpr int kExchange = kOwnBuffers ? kBuffer * kParts : kBuffer;  // floats
  static_assert(kFragments % kParts == 0, "a part of the exchange is whole fragments");

  template <bool kAligned>
  static constexpr bool kStaged = kAligned && kMostRows > 0;  // such copies need aligned addresses
  template <typename T, bool kAligned>
  static constexpr int kSharedBytes =
      kExchange * static_cast<int>(sizeof(float)) + (kStaged<kAligned> ? static_cast<int>(sizeof(T)) << kBits : 0);
};

// Where an element of the exchange is kept. Of its quad's index (a quad is 4 consecutive floats) bit 3 is folded into
// bit 0, so that the eight lanes of one 128-byte access, whose quads are 2 apart in the 16-bit layout, use all banks.
__device__ __forceinline__ int Swizzle(int element) { return element ^ (element >> 3 & 4); }

// How many blocks are to fit on a multiprocessor. Elsewhere than on sm_90, ptxas takes a few registers more.
constexpr int BlocksToFit(int blocks) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
  return blocks;
#else
  return blocks > 2 ? blocks * 3 / 4 : blocks;
#endif
}

// A block owns work.per_block consecutive rows. kAligned: x and y are aligned to 16 bytes.
template <typename In, typename Out, typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, BlocksToFit(Shape::kBlocksPerProcessor)) LongRows(const Work work) {
  using InStorage = typename Element<In>::Storage;
  using OutStorage = typename Element<Out>::Storage;
  constexpr int kN = 1 << Shape::kBits, kWarps = Shape::kWarps, kFragments = Shape::kFragments;
  constexpr bool kStaged = Shape::template kStaged<kAligned>;
  constexpr int kChunk = kFragments * kFragment;
  constexpr int kPart = kChunk / Shape::kParts;  // elements of a chunk in one part of the exchange
  constexpr int kPartFragments = kFragments / Shape::kParts;
  constexpr int kWidth = Min(4, kPart / Shape::kThreads);  // consecutive elements that a thread takes of every chunk
  constexpr int kSteps = kPart / kWidth / Shape::kThreads;
  static_assert(kSteps * kWidth * Shape::kThreads == kPart, "the threads share a part evenly");
  extern __shared__ float4 shared_memory[];
  float* const exchange = reinterpret_cast<float*>(shared_memory);
  InStorage* const staged = reinterpret_cast<InStorage*>(exchange + Shape::kExchange);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const InStorage* x = static_cast<const InStorage*>(work.x);
  OutStorage* y = static_cast<OutStorage*>(work.y);
  const float scale = static_cast<float>(work.scale);
  const int64_t first = blockIdx.x * work.per_block;
  const int64_t end = min(work.count, first + work.per_block);
  const typename Fragment<In>::template Matrices<8, true> matrices;

  // Every warp stages its own chunk, and every thread what it will load itself, so no barrier is needed.
  const auto stage = [&](int64_t row) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int at = warp * kChunk + f * kFragment;
      Fragment<In>::StartLoad(staged + at, x + row * kN + at);
    }
  };

  WaitForPreviousLaunch();
  if constexpr (kStaged) stage(first);
  for (int64_t row = first; row < end; ++row) {
    // The low bits: each warp its chunk, in registers.
    Fragment<In> fragments[kFragments];
    if constexpr (kStaged) FinishCopies();
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int at = warp * kChunk + f * kFragment;
      if constexpr (kStaged) {
        fragments[f].Load(staged + at);
      } else if constexpr (kAligned) {
        fragments[f].Load(x + row * kN + at);
      } else {
        fragments[f].LoadSlots(x + row * kN + at, kAllSlots);
      }
    }
    float v[kFragments][kSlots];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) fragments[f].Transform(v[f], matrices);
    if constexpr (kStaged) {
      if (row + 1 < end) stage(row + 1);
    }
    Butterflies(v);

    // The bits above a chunk: each thread the same few elements of every chunk.
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      // A buffer is free once all have read what it held: with several, the barrier of the part before tells.
      if (Shape::kParts == 1 ? row > first : !Shape::kOwnBuffers && (part > 0 || row > first)) __syncthreads();
      float* const buffer = exchange + (Shape::kOwnBuffers ? part * Shape::kBuffer : 0);
#pragma unroll
      for (int i = 0; i < kPartFragments; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* quad = &v[part * kPartFragments + i][4 * half];
          const int at = warp * kPart + i * kFragment + Swizzle(4 * Fragment<In>::Quad(half));
          *reinterpret_cast<float4*>(&buffer[at]) = make_float4(quad[0], quad[1], quad[2], quad[3]);
        }
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = (step * Shape::kThreads + thread) * kWidth;
        float u[kWarps][kWidth];
#pragma unroll
        for (int chunk = 0; chunk < kWarps; ++chunk) LoadVector<kWidth>(u[chunk], &buffer[chunk * kPart + Swizzle(at)]);
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
    }
  }
}

}  // namespace jax_hadacore::cuda
