// strided_rows.cuh: short rows of 16-bit elements that are `stride` apart, the columns of (n, stride) tiles: the
// transform of an axis that is not the last.
#pragma once

#include "fragment.cuh"
#include "kernels.h"

namespace jax_hadacore::cuda {

// A piece of a tile, kWords words of two elements of each row, waits in shared memory, from which a lane takes for two
// neighbouring columns what a Fragment of rows asks for. So a column's bits are those of a row. kWarps share a piece,
// and a block has kPieces.
template <int kBits_, int kWords_, int kWarps_, int kPieces_>
struct StridedShape {
  static constexpr int kBits = kBits_, kN = 1 << kBits, kWords = kWords_, kWarps = kWarps_, kPieces = kPieces_;
  static constexpr int kTogether = kFragment / kN;  // words of a row that are transformed at once
  static constexpr int kColumns = 2 * kWords;
  // The lanes ask for rows 8 apart, which the gaps between them put into different banks.
  static constexpr int kGap = Max(4, kTogether);
  static constexpr int kPieceWords = kN * kWords + kN / 8 * kGap;
  static_assert(kWarps == 1 || kPieces == 1, "warps that meet leave together");
  static constexpr int kThreadsOfPiece = 32 * kWarps, kThreads = kPieces * kThreadsOfPiece;
  static constexpr int kSharedBytes = kPieces * kPieceWords * 4;

  static constexpr int Place(int row, int word) { return row * kWords + row / 8 * kGap + word; }
};

// A fragment of whole rows in which something is unsafe: these rows apart.
template <typename T, int kBits, typename Matrices>
__device__ __forceinline__ void TransformUnsafe(float (&v)[kSlots], Fragment<T> fragment, const Matrices& matrices) {
  const unsigned unsafe = fragment.template UnsafeRows<kBits>();
  float apart[kSlots];
  fragment.template TransformByButterflies<kBits>(apart);
  fragment.Zero(unsafe);
  fragment.Transform(v, matrices);
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    if (unsafe >> s & 1) v[s] = apart[s];
}

// Rows of two words' columns, in place.
template <typename T, typename Shape, typename Matrices>
__device__ __forceinline__ void TransformColumns(uint32_t* words, float scale, const Matrices& matrices) {
  constexpr int kStep = Shape::kWords;  // from slot to slot: 8 elements of a row are in 8 rows of the piece
  Fragment<T> fragments[2];
#pragma unroll
  for (int r = 0; r < kSlots / 2; ++r) {
    const uint32_t a = words[2 * r * kStep], b = words[(2 * r + 1) * kStep];
    fragments[0].raw[r] = __byte_perm(a, b, 0x5410);
    fragments[1].raw[r] = __byte_perm(a, b, 0x7632);
  }
  float v[2][kSlots];
  bool unsafe = false;
  if constexpr (Shape::kBits < 8) unsafe = __any_sync(kWarp, fragments[0].HasUnsafe() || fragments[1].HasUnsafe());
  if (unsafe) {
    if constexpr (Shape::kBits < 8)
#pragma unroll
      for (int f = 0; f < 2; ++f) TransformUnsafe<T, Shape::kBits>(v[f], fragments[f], matrices);
  } else {
#pragma unroll
    for (int f = 0; f < 2; ++f) fragments[f].Transform(v[f], matrices);
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) words[s * kStep] = Pack<T>(v[0][s] * scale, v[1][s] * scale);
}

// work.count columns; work.aligned: the rows of a tile are aligned to 16 bytes.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) StridedRows(const Work work) {
  constexpr int kN = Shape::kN, kThreads = Shape::kThreadsOfPiece, kChunk = 8;
  constexpr int kChunksOfRow = Shape::kColumns / kChunk, kRowsAtOnce = kThreads / kChunksOfRow;
  static_assert(kRowsAtOnce <= kN);
  extern __shared__ uint4 shared_memory[];

  // There are fewer pieces than 2^32, whose division is fast.
  const auto pieces = static_cast<uint32_t>((work.stride + Shape::kColumns - 1) / Shape::kColumns);  // of a tile
  const uint32_t piece = blockIdx.x * Shape::kPieces + threadIdx.x / kThreads, tile = piece / pieces;
  if (tile * work.stride >= work.count) return;
  const int64_t first = int64_t{piece % pieces} * Shape::kColumns;
  const int columns = static_cast<int>(min(work.stride - first, int64_t{Shape::kColumns}));
  const int64_t origin = tile * (kN * work.stride) + first;
  const auto* const x = static_cast<const uint16_t*>(work.x) + origin;
  auto* const y = static_cast<uint16_t*>(work.y) + origin;
  uint32_t* const words = reinterpret_cast<uint32_t*>(shared_memory) + threadIdx.x / kThreads * Shape::kPieceWords;

  const int thread = static_cast<int>(threadIdx.x % kThreads);
  const int row = thread / kChunksOfRow, chunk = thread % kChunksOfRow;
  uint32_t* const own_chunk = words + Shape::Place(row, 4 * chunk);
  const int64_t own_offset = row * work.stride + kChunk * chunk, step = kRowsAtOnce * work.stride;
  const bool inside = kChunk * chunk < columns;
  const auto meet = [] { Shape::kWarps > 1 ? __syncthreads() : SyncWarp(); };
  const auto each_element = [&](auto&& use) {
#pragma unroll 1
    for (int i = 0; i < kN; ++i)
      for (int column = thread; column < Shape::kColumns; column += kThreads)
        use(reinterpret_cast<uint16_t*>(words + Shape::Place(i, 0))[column], i * work.stride + column,
            column < columns);
  };

  WaitForPreviousLaunch();
  if (work.aligned) {
    const uint16_t* from = x + own_offset;
#pragma unroll
    for (int i = 0; i < kN; i += kRowsAtOnce, from += step) {
      uint32_t* const to = own_chunk + Shape::Place(i, 0);
      if (inside) {
        StartCopy<0>(to, from);
      } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      }
    }
  } else {
    each_element([&](uint16_t& to, int64_t offset, bool in_tile) { to = in_tile ? x[offset] : 0; });
  }
  const typename Fragment<T>::template Matrices<Shape::kBits> matrices;
  FinishCopies();
  meet();
  constexpr int kLanes = kN / kSlots;  // that a row is of
  uint32_t* const own = words + Shape::Place(Lane() % kLanes * kSlots, Lane() / kLanes);
#pragma unroll 1
  for (int word = thread / 32 * Shape::kTogether; 2 * word < columns; word += Shape::kWarps * Shape::kTogether)
    TransformColumns<T, Shape>(own + word, work.float_scale, matrices);
  meet();
  if (work.aligned) {
    if (inside) {
      uint16_t* to = y + own_offset;
#pragma unroll
      for (int i = 0; i < kN; i += kRowsAtOnce, to += step)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(own_chunk + Shape::Place(i, 0));
    }
  } else {
    each_element([&](uint16_t from, int64_t offset, bool in_tile) {
      if (in_tile) y[offset] = from;
    });
  }
}

template <typename T, int kBits, int kWords, int kWarps, int kPieces>
StridedKernel MakeStridedKernel() {
  using Shape = StridedShape<kBits, kWords, kWarps, kPieces>;
  return {{"strided rows", reinterpret_cast<const void*>(&StridedRows<T, Shape>), Shape::kThreads, Shape::kSharedBytes},
          Shape::kColumns,
          Shape::kPieces};
}

template <typename T>
StridedKernel FindStridedKernel(int bits) {
  switch (bits) {  // <type, bits, words, warps, pieces>, as measured (docs/kernel.md)
    case 3: return MakeStridedKernel<T, 3, 64, 1, 2>();
    case 4: return MakeStridedKernel<T, 4, 32, 1, 2>();
    case 5: return MakeStridedKernel<T, 5, 32, 2, 1>();
    case 6: return MakeStridedKernel<T, 6, 32, 4, 1>();
    case 7: return MakeStridedKernel<T, 7, 32, 4, 1>();
    default: return MakeStridedKernel<T, 8, 32, 8, 1>();
  }
}

}  // namespace jax_hadacore::cuda
