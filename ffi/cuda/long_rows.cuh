// long_rows.cuh: rows that one block transforms with one exchange through shared memory: those of 2048 to 32768
// elements, and of 1024 where there are few.
#pragma once

#include <utility>

#include "codes.cuh"
#include "fragment.cuh"

namespace jax_hadacore::cuda {

// Of the exchange's buffers: how many parts it goes in, each of which needs only that part of a row's float32 sums in
// shared memory, and whether every part has a buffer of its own, which saves a barrier.
template <int kParts_, bool kOwnBuffers_ = false>
struct Exchange {
  static constexpr int kParts = kParts_;
  static constexpr bool kOwnBuffers = kOwnBuffers_ || kParts == 1;
};

// How a block gets its rows: one, straight into registers.
struct Direct {
  static constexpr bool kStaged = false, kSplit = false;
  static constexpr int kMostRows = 1, kRunPercent = 0, kMostTurns = 0;
};
// Or staged in shared memory, where the next one waits while the block works on this one: up to kMostRows consecutive
// rows. Where there are up to kMostTurns rows for each block that runs at once, kRunPercent of them go to as many
// blocks as that in long runs, which all end at about the same time, and one to each block after those, which evens it
// out.
template <int kMostRows_, int kRunPercent_ = 0, int kMostTurns_ = 0>
struct Staged {
  static constexpr bool kStaged = true, kSplit = false;
  static constexpr int kMostRows = kMostRows_, kRunPercent = kRunPercent_, kMostTurns = kMostTurns_;
};
// Or one, of which the block computes half, beside the block that computes the other half.
struct Split : Direct {
  static constexpr bool kSplit = true;
};

// How many segments a row is read as. Of two the tensor cores transform the sum and the difference: the butterflies of
// the row's highest bit, which come first then and cost next to nothing. A length's kernels have to agree on it.
template <typename T>
constexpr int Segments(int bits) {
  return Fragment<T>::kAddsSegments && bits > 10 ? 2 : 1;
}

// Starts to stage a warp's fragments, of which kPer consecutive ones are in each segment.
template <typename T, int kSegment, int kPer, int... f>
__device__ __forceinline__ void StageFragments(typename Element<T>::Storage* to,
                                               const typename Element<T>::Storage* from,
                                               std::integer_sequence<int, f...>) {
  (Fragment<T>::template StartLoad<f / kPer * kSegment + f % kPer * kFragment>(to, from), ...);
}

// The shape of a block: its sums are kWarps chunks of kFragments fragments, one chunk a warp.
template <int kBits_, int kFragments_, int kBlocksPerProcessor_, typename Exchange, typename Rows_ = Direct>
struct LongRowsShape {
  static constexpr int kBits = kBits_;
  static constexpr int kFragments = kFragments_;
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;
  static constexpr int kParts = Exchange::kParts;
  static constexpr bool kOwnBuffers = Exchange::kOwnBuffers;
  using Rows = Rows_;
  static constexpr int kBlocksPerRow = Rows::kSplit ? 2 : 1;
  static constexpr int kWarps = (1 << kBits) / kBlocksPerRow / kFragment / kFragments;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBuffer = (1 << kBits) / kBlocksPerRow / kParts;       // floats
  static constexpr int kExchange = kOwnBuffers ? kBuffer * kParts : kBuffer;  // floats
  static_assert(kFragments % kParts == 0, "a part of the exchange is whole fragments");

  template <bool kAligned>
  static constexpr bool kStaged = kAligned && Rows::kStaged;  // such copies need aligned addresses
  template <typename T, bool kAligned>
  static constexpr int kSharedBytes =
      kExchange * static_cast<int>(sizeof(float)) + (kStaged<kAligned> ? static_cast<int>(sizeof(T)) << kBits : 0);
  // Of a kernel whose results are codes.
  template <typename T>
  static constexpr int kSharedBytesForCodes = kSharedBytes<T, true> + kWarps * static_cast<int>(sizeof(Span));
};

// Where an element of the exchange is kept. Of its quad's index (a quad is 4 consecutive floats) bit 3 is folded into
// bit 0, so that the eight lanes of one 128-byte access, whose quads are 2 apart in the 16-bit layout, use all banks.
__device__ __forceinline__ int Swizzle(int element) { return element ^ (element >> 3 & 4); }

// Loads the exchange's elements from `first` on, a multiple of kWidth.
template <int kWidth>
__device__ __forceinline__ void LoadExchanged(float (&v)[kWidth], const float* exchange, int first) {
  if constexpr (kWidth > 4) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      float quad[4];
      LoadVector<4>(quad, &exchange[Swizzle(first + i)]);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = quad[j];
    }
  } else {
    LoadVector<kWidth>(v, &exchange[Swizzle(first)]);
  }
}

// How many blocks are to fit on a multiprocessor. Elsewhere than on sm_90, ptxas takes a few registers more.
constexpr int BlocksToFit(int blocks) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
  return blocks;
#else
  return blocks > 2 ? blocks * 3 / 4 : blocks;
#endif
}

// kAligned: x and y are aligned to 16 bytes. kSigned: the rows have signs; `words` are null where they have none.
template <typename In, typename Out, typename Shape, bool kAligned, bool kSigned>
__device__ __forceinline__ void TransformLongRows(const Work& work, const uint32_t* words) {
  using InStorage = typename Element<In>::Storage;
  using OutStorage = typename Element<Out>::Storage;
  constexpr int kN = 1 << Shape::kBits, kWarps = Shape::kWarps, kFragments = Shape::kFragments;
  constexpr bool kStaged = Shape::template kStaged<kAligned>, kSplit = Shape::Rows::kSplit;
  // A warp's fragments of sums are `kPer` consecutive ones of each of `kOutputs` segments, from as many of every
  // segment.
  constexpr int kSegments = Segments<In>(Shape::kBits), kOutputs = kSplit ? 1 : kSegments;
  constexpr int kSegment = kN / kSegments, kPer = kFragments / kOutputs, kChunk = kPer * kFragment;
  constexpr int kPart = kFragments / Shape::kParts * kFragment;  // of a warp's sums in one part of the exchange
  constexpr bool kQuantized = kIsQuantized<Out>;
  // Consecutive elements that a thread takes of every warp: as many as it stores at once.
  constexpr int kWidth = Min(kQuantized ? 8 : 4, kPart / Shape::kThreads);
  constexpr int kStride = kWidth * Shape::kThreads;  // what all threads take of every warp in a step
  constexpr int kSteps = kPart / kStride;
  static_assert(kSteps * kStride == kPart, "the threads share a part evenly");
  static_assert(!kSplit || kSegments == 2, "only rows of two segments are split");
  static_assert(!kSigned || kAligned, "unaligned rows have their signs from elsewhere");
  extern __shared__ float4 shared_memory[];
  float* const exchange = reinterpret_cast<float*>(shared_memory);
  InStorage* const staged = reinterpret_cast<InStorage*>(exchange + Shape::kExchange);

  int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const unsigned block_of_row = blockIdx.x % Shape::kBlocksPerRow;  // 1: the block of the differences
  const InStorage* x = static_cast<const InStorage*>(work.x) + warp * kChunk;
  OutStorage* y = static_cast<OutStorage*>(work.y) + block_of_row * kSegment;
  const float scale = work.float_scale;
  int64_t row = blockIdx.x / Shape::kBlocksPerRow, stride = 1, end = row + 1;
  if constexpr (kStaged && Shape::Rows::kMostRows > 1) {
    if (row < work.runs) {
      stride = work.runs;
      end = work.runs * work.run_rows;
    } else {
      row = work.runs * work.run_rows + (row - work.runs) * work.per_block;
      end = min(work.count, row + work.per_block);
    }
  }
  const typename Fragment<In>::template Matrices<8, true> matrices;

  // Every warp stages its own chunk, and every thread what it will load itself, so no barrier is needed.
  InStorage* const own = staged + warp * kChunk;
  const auto stage = [&](int64_t next) {
    StageFragments<In, kSegment, kPer>(own, x + next * kN, std::make_integer_sequence<int, kSegments * kPer>{});
  };

  WaitForPreviousLaunch();
  if constexpr (kStaged) stage(row);
  [[maybe_unused]] Span* const spans = reinterpret_cast<Span*>(staged + (kStaged ? kN : 0));  // one of each warp
  for (bool again = false; row < end; row += stride, again = true) {
    // The low bits, and the highest where a row is two segments: each warp its chunk, in registers.
    Fragment<In> fragments[kSegments][kPer];
    typename Fragment<In>::Signs first[kSegments][kPer];  // on their way before the elements are waited for
    if (kSigned && !work.signs_last) {
      const uint32_t* const signs = RowSigns(work, words) + warp * kChunk / 32;
#pragma unroll
      for (int segment = 0; segment < kSegments; ++segment)
#pragma unroll
        for (int i = 0; i < kPer; ++i)
          first[segment][i] =
              Fragment<In>::template SlotSigns<Shape::kBits>(signs + (segment * kSegment + i * kFragment) / 32);
    }
    if constexpr (kStaged) FinishCopies();
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment)
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int at = segment * kSegment + i * kFragment;
        if constexpr (kStaged) {
          fragments[segment][i].Load(own + at);
        } else if constexpr (kAligned) {
          fragments[segment][i].Load(x + row * kN + at);
        } else {
          fragments[segment][i].LoadSlots(x + row * kN + at, kAllSlots);
        }
      }
    if (kSigned && !work.signs_last) {
#pragma unroll
      for (int segment = 0; segment < kSegments; ++segment)
#pragma unroll
        for (int i = 0; i < kPer; ++i) fragments[segment][i].Apply(first[segment][i]);
    }
    if constexpr (kSigned || kQuantized) KeepOutOfRegisters(thread);
    float v[kOutputs][kPer][kSlots];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if constexpr (kSegments == 1) {
        fragments[0][i].Transform(v[0][i], matrices);
      } else if constexpr (kOutputs == 1) {
        fragments[1][i].ChangeSigns(block_of_row * kAllSigns);
        Fragment<In>::TransformSum(v[0][i], fragments[0][i], fragments[1][i], matrices);
      } else {
        Fragment<In>::TransformSumAndDifference(v[0][i], v[1][i], fragments[0][i], fragments[1][i], matrices);
      }
    }
    if constexpr (kStaged) {
      if (row + stride < end) stage(row + stride);
    }
#pragma unroll
    for (int output = 0; output < kOutputs; ++output) Butterflies(v[output]);
    if constexpr (kSplit) {
      if (work.meet) ArriveAtCluster();
    }

    // Codes have to wait for the whole row.
    std::conditional_t<kQuantized, KeptRow<Shape::kParts * kSteps, kWarps, kWidth, kChunk>, Nothing> results;

    // The bits above a chunk: each thread the same few elements of every chunk, which of the row's first chunk are at
    // the place of a step of a part.
    const auto place = [&](int part, int step) {
      const int sum = part * kPart + (step * Shape::kThreads + thread) * kWidth;  // among a warp's
      return sum / kChunk * kSegment + sum % kChunk;
    };
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      // A buffer is free once all have read what it held: with several, the barrier of the part before tells.
      if (Shape::kParts == 1 ? again : !Shape::kOwnBuffers && (part > 0 || again)) __syncthreads();
      float* const buffer = exchange + (Shape::kOwnBuffers ? part * Shape::kBuffer : 0);
#pragma unroll
      for (int i = 0; i < kPart / kFragment; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int fragment = part * (kPart / kFragment) + i;
          const float* quad = &v[fragment / kPer][fragment % kPer][4 * half];
          const int at = warp * kPart + i * kFragment + Swizzle(4 * Fragment<In>::Quad(half));
          *reinterpret_cast<float4*>(&buffer[at]) = make_float4(quad[0], quad[1], quad[2], quad[3]);
        }
      PackedSigns<kWidth> last[kSteps][kWarps];  // all before a store, which no load of theirs can be moved across
      if (kSigned && work.signs_last) {
        const uint32_t* const signs = RowSigns(work, words);
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int chunk = 0; chunk < kWarps; ++chunk)
            last[step][chunk] = PackedSigns<kWidth>::From(signs + chunk * kChunk / 32, place(part, step));
      }
      __syncthreads();
      if constexpr (kSplit) {
        if (work.meet && part == 0) WaitForCluster();
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = (step * Shape::kThreads + thread) * kWidth;
        float u[kWarps][kWidth];
#pragma unroll
        for (int chunk = 0; chunk < kWarps; ++chunk) LoadExchanged(u[chunk], &buffer[chunk * kPart], at);
        Butterflies(u);
        if constexpr (kQuantized) {
          results.Keep(part * kSteps + step, u);
        } else {
          OutStorage* const to = y + row * kN + place(part, step);
          const auto store = [&](auto signs_of) {
#pragma unroll
            for (int chunk = 0; chunk < kWarps; ++chunk) {
              if constexpr (kAligned) {
                Element<Out>::template Store<kWidth>(to + chunk * kChunk, u[chunk], scale, signs_of(chunk));
              } else {
#pragma unroll
                for (int i = 0; i < kWidth; ++i) to[chunk * kChunk + i] = Element<Out>::Round(u[chunk][i] * scale);
              }
            }
          };
          if (kSigned && work.signs_last) {
            store([&](int chunk) { return last[step][chunk]; });
          } else {
            store([](int) { return PackedSigns<kWidth>{}; });
          }
        }
      }
    }
    if constexpr (kQuantized) {
      KeepOutOfRegisters(thread);
      // A thread's places are as far from its first as those of thread 0.
      static_assert(kStride % kChunk == 0 || kChunk % kStride == 0);
      const auto at = [](int sum) { return sum / kChunk * kSegment + sum % kChunk; };
      const auto offset = [&](int set) { return at(set / kSteps * kPart + set % kSteps * kStride); };
      const int64_t first = row * kN + at(thread * kWidth);
      if constexpr (Out::kFormats == Formats::kOfRows) {
        results.StoreRow(work, row, first, spans, offset);
      } else {
        results.template StoreGroups<Out::kFormats>(work, first, offset);
      }
    }
  }
}

// The two are apart because __grid_constant__, which words need, costs the other registers.
template <typename In, typename Out, typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, BlocksToFit(Shape::kBlocksPerProcessor)) LongRows(const Work work) {
  TransformLongRows<In, Out, Shape, kAligned, false>(work, nullptr);
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, BlocksToFit(Shape::kBlocksPerProcessor))
    SignedLongRows(const __grid_constant__ WorkAndSigns<Shape::kBits> given) {
  TransformLongRows<T, T, Shape, true, true>(given.work, given.words);
}

}  // namespace jax_hadacore::cuda
