// pair_ring.cuh: 16-bit rows of k * l * 2^m elements on sm_90a, in one pass. Warp groups multiply by both matrices, and
// the sums stay in their registers from the first product to the store.
#pragma once

#include "order_ring.cuh"
#include "pair_ring.h"

namespace jax_hadacore::cuda {

// A row is an array of groups of kWidth consecutive elements, (s, a, f): a is the index of the first step's matrix, s
// that of the second's, and f counts kApart groups side by side. In shared memory it becomes a plane for each element
// of the groups, (a, j) with columns j = (s, f), so that a product leaves in a thread
//
//   sums of all kWidth elements            butterflies add them up
//   of 2 of every 8 columns, of two a's    as operand A has them: the second product follows from registers
//
// and all results of a group are in one thread in the end.
template <typename T_, int kWidth_, int kApart_, int kEights_>
struct PairShape {
  using T = T_;
  static constexpr int kWidth = kWidth_, kApart = kApart_, kEights = kEights_;
  static constexpr int kSums = 4 * kEights;  // of an element
};

// With groups of 4 elements a chunk is those of two a's, and 8 chunks become a line of even a's and one of odd ones. So
// the columns of the matrix are in this order, and the rows too: a thread then has the results of neighbours.
template <int kWidth>
__device__ __forceinline__ constexpr int PairIndex(int i) {
  return kWidth == 8 ? i : i / 16 * 16 + i % 8 * 2 + i / 8 % 2;
}

// How much further than the first of 8 columns the second step's result column i of them is in s; groups side by side
// are in neighbouring lanes.
template <int kApart>
__device__ __forceinline__ constexpr int ResultIndex(int i) {
  return i / 2 / kApart * 2 + i % 2;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The first matrix's signs, as a lane needs them for four steps: those of register i in bits 31 - i and 15 - i; and the
// second matrix as operand B.
template <typename Shape>
__device__ __forceinline__ void PlaceMatrices(char* shared, const PairLayout& ring, const uint32_t* given, int thread,
                                              int threads) {
  constexpr int kWidth = Shape::kWidth, kApart = Shape::kApart;
  const int row_words = static_cast<int>(SignWords(ring.order));
  uint32_t* const signs = reinterpret_cast<uint32_t*>(shared + ring.SignsAt());
  for (int i = thread; i < ring.Steps() * ring.SignsOfRows(); i += threads) {
    const int first_row = i / ring.SignsOfRows() * 16, first_column = i % ring.SignsOfRows() / 32 * 64, lane = i % 32;
    uint32_t word = 0;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t* const from =
          given + PairIndex<kWidth>(first_row + ARow(lane, row)) * row_words + first_column / 32;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of the columns
        const uint32_t of_half = first_column / 32 + half < row_words ? from[half] : 0;
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int r = row; r < 4; r += 2)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int column = PairIndex<kWidth>(16 * step + AColumn(lane, r, h));
              word |= SignBit(&of_half, static_cast<unsigned>(column)) << (15 + 16 * h - 4 * (2 * half + step) - r);
            }
      }
    }
    signs[i] = word;
  }

  const uint32_t* const second = given + 16 * ring.Steps() * row_words;
  const int order = ring.columns / kApart, second_words = static_cast<int>(SignWords(order));
  const auto entry = [&](int result, int column) -> uint32_t {
    const int s = result / 8 * (8 / kApart) + ResultIndex<kApart>(result % 8), f = result % 8 / 2 % kApart;
    if (s >= order || column >= ring.columns) return 0;
    const uint32_t minus = SignBit(second + s * second_words, static_cast<unsigned>(column / kApart));
    return 0x3f80 ^ (minus ^ (static_cast<uint32_t>(__popc(static_cast<unsigned>(f & column % kApart))) & 1)) << 15;
  };
  const int pairs = ring.SecondEight() / kPairMatrix * 4;
  for (int i = thread; i < 8 * Shape::kEights * pairs; i += threads) {
    const int result = i / pairs, column = i % pairs * 2;
    *reinterpret_cast<uint32_t*>(shared + ring.SecondAt() + result / 8 * ring.SecondEight() + column / 8 * kPairMatrix +
                                 result % 8 * kPairChunk + column % 8 * 2) =
        entry(result, column) | entry(result, column + 1) << 16;
  }
}

// The columns beyond the second matrix, in all parts.
template <typename Shape>
__device__ __forceinline__ void ClearColumns(char* shared, const PairLayout& ring, int thread, int threads) {
  const int beyond = 8 * Shape::kEights - ring.columns, lines = ring.Eight() / kPairMatrix;
  for (int i = thread; i < ring.parts * Shape::kWidth * beyond * lines; i += threads) {
    const int plane = i / (beyond * lines), line = i % (beyond * lines) / beyond, j = ring.columns + i % beyond;
    *reinterpret_cast<uint4*>(shared + plane / Shape::kWidth * ring.Part() + plane % Shape::kWidth * ring.Plane() +
                              j / 8 * ring.Eight() + line * kPairMatrix + j % 8 * kPairChunk) = make_uint4(0, 0, 0, 0);
  }
}

// Where a warp is in the sequence of all pieces of a block's rows.
struct PieceOfRow {
  int row, piece;

  __device__ __forceinline__ void Next(int by, int pieces, int blocks) {
    for (piece += by; piece >= pieces; piece -= pieces) row += blocks;
  }
};

// One of the warps that bring the rows: it takes pieces in turn with the others, has some of its own on their way, and
// transposes 8 chunks at a time to lines of 8 a's in the planes.
template <typename Shape, bool kAligned>
__device__ __forceinline__ void BringPieces(const Work& work, const PairLayout& ring, char* shared,
                                            const uint32_t* signs) {
  constexpr int kWidth = Shape::kWidth, kApart = Shape::kApart;
  const int lane = Lane(), warp = UniformWarp() % kPairBringers;
  const int rows = static_cast<int>(work.count), blocks = static_cast<int>(work.runs);
  const int chunks = ring.Chunks(), pieces = ring.Pieces(), ahead = ring.Ahead();
  const char* const own = shared + ring.PiecesAt() + warp * ahead * ring.Piece();
  const auto barrier = [&](int at) { return AddressOf(shared + ring.BarriersAt() + 8 * at); };
  const int first_barrier = 2 * ring.parts + warp * ahead;

  PieceOfRow coming{static_cast<int>(blockIdx.x), 0};
  coming.Next(warp, pieces, blocks);
  PieceOfRow going = coming;
  const auto start = [&](int slot) {
    if (coming.row >= rows) return;
    const uint16_t* const from = static_cast<const uint16_t*>(work.x) + coming.row * work.n +
                                 coming.piece * (ring.Piece() / static_cast<int>(sizeof(uint16_t)));
    char* const to = shared + ring.PiecesAt() + (warp * ahead + slot) * ring.Piece();
    if constexpr (kAligned) {
      if (lane == 0) StartCopies(to, from, ring.Piece(), barrier(first_barrier + slot));
    } else {
      for (int i = lane; i < 2 * chunks; i += 32) reinterpret_cast<uint4*>(to)[i] = LoadGroup(from + 8 * i);
    }
    coming.Next(kPairBringers, pieces, blocks);
  };
  for (int slot = 0; slot < ahead; ++slot) start(slot);

  // A lane names row lane % 8 of matrix lane / 8, both ways: a chunk, and an element of 8 chunks.
  const int column = lane / 16, first_chunk = lane / 8 % 2 * 8;
  const auto place = [&](int chunk) { return kApart == 1 ? column * chunks + chunk : chunk * kApart + column; };
  const int from = place(first_chunk + lane % 8) * kPairChunk, left = chunks - (first_chunk + lane % 8);
  const int to = lane % 8 % kWidth * ring.Plane() + (first_chunk + lane % 8 / kWidth * kWidth) / kWidth * kPairMatrix;
  const SharedAddress zeros = AddressOf(shared + ring.ZerosAt());
  int slot = 0, slot_turn = 0, part = 0, turn = 0;
  while (going.row < rows) {
    const int row = going.row;
    WaitAt(barrier(ring.parts + part), turn ^ 1);
    do {
      if constexpr (kAligned) WaitAt(barrier(first_barrier + slot), slot_turn);
      SyncWarp();
      SharedAddress next = AddressOf(own + slot * ring.Piece() + from);
      const int j = 2 * going.piece + column;
      SharedAddress line = AddressOf(shared + part * ring.Part() + j / 8 * ring.Eight() + j % 8 * kPairChunk + to);
#pragma unroll 2
      for (int task = 0; task < ring.Tasks(); ++task) {
        uint32_t v[4];
        LoadLines(v, 16 * task < left ? next : zeros);
        if (signs)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int chunk = 16 * task + i % 2 * 8 + lane / 4;
            const int at = 2 * chunks * going.piece + (kApart == 1 ? i / 2 * chunks + chunk : chunk * kApart + i / 2);
            if (chunk < chunks)
              v[i] ^= PackedSigns<2>::From(signs, static_cast<unsigned>(8 * at + lane % 4 * 2)).Pair(0);
          }
        StoreTransposed(line, v);
        next += 16 * kApart * kPairChunk;
        line += 16 / kWidth * kPairMatrix;
      }
      SyncWarp();
      start(slot);
      if (++slot == ahead) slot = 0, slot_turn ^= 1;
      going.Next(kPairBringers, pieces, blocks);
    } while (going.row == row);
    ShowToProducts();
    ArriveAt(barrier(part));
    if (++part == ring.parts) part = 0, turn ^= 1;
  }
}

// Multiplies the columns of an element's sums by the second matrix.
template <int kSums>
__device__ __forceinline__ void TransformColumns(float (&results)[1][kSums], const float (&sums)[kSums],
                                                 SharedLines second) {
  constexpr int kSteps = (kSums + 7) / 8;
  uint32_t hi[kSteps][4] = {}, lo[kSteps][4] = {};
#pragma unroll
  for (int pair = 0; pair < kSums / 2; ++pair) {
    const HiLo sum(sums[2 * pair], sums[2 * pair + 1]);
    hi[pair / 4][pair % 4] = sum.hi, lo[pair / 4][pair % 4] = sum.lo;
  }
  BeginProducts();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    StartProduct<BF16>(results, lo[step], second.Further(step * 2 * kPairMatrix), step > 0);
    StartProduct<BF16>(results, hi[step], second.Further(step * 2 * kPairMatrix), true);
  }
  CommitProduct();
  AwaitProducts<0>();
}

// Results of two neighbouring elements, scaled, rounded and packed, as they take fewer registers.
template <typename Shape>
using PairResults = uint32_t[Shape::kWidth / 2][Shape::kSums];

// Stores results, whole groups. kAligned: the rows are. kSigned: they may have signs.
template <typename Shape, bool kAligned, bool kSigned>
__device__ __forceinline__ void Store(const PairResults<Shape>& results, uint16_t* y, const Work& work, int first_a,
                                      const uint32_t* signs) {
  constexpr int kWidth = Shape::kWidth, kApart = Shape::kApart, kEights = Shape::kEights;
  const int lane = Lane(), order = work.order, of_second = order * kApart * kWidth;
  const int first_s = ResultIndex<kApart>(lane % 4 * 2), second_order = work.columns / kApart;
#pragma unroll
  for (int half = 0; half < kWidth / 4; ++half) {
    const int a = first_a + (kWidth == 8 ? lane / 4 + 8 * half : lane / 4 * 2);
    if (a >= order) return;
    const int at = (first_s * order + a) * (kApart * kWidth) + lane % 4 % kApart * kWidth;
    uint16_t* to = y + at;
    const int64_t next = of_second, next_eight = int64_t{8 / kApart - 1} * of_second;
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int further = eight * (8 / kApart) + i;
        const auto packed = [&](int pair) {
          return results[pair % (kWidth / 2)][4 * eight + 2 * (kWidth == 8 ? half : pair / 2) + i];
        };
        if (first_s + further < second_order) {
          uint4 v = make_uint4(packed(0), packed(1), packed(2), packed(3));
          if (kSigned && signs)
            v = Signed(v, PackedSigns<8>::From(signs, static_cast<unsigned>(at + further * of_second)));
          StoreGroup<kAligned>(to, v);
        }
        to += i == 0 ? next : next_eight;
        KeepOutOfRegisters(to);  // or each address would be computed from the first
      }
  }
}

// A block takes rows in turn with the others. One warp group brings them, as the ring becomes free; the others take
// the tiles of rows that have come in turn, and wait for each other nowhere.
template <typename Shape>
__device__ __forceinline__ void TransformPairs(const Work& work, const uint32_t* given) {
  using T = typename Shape::T;
  constexpr int kWidth = Shape::kWidth, kMultiplying = 128 * kRingMultipliers;
  const PairLayout ring = {kWidth, Shape::kApart, Shape::kEights, work.order, work.columns, work.ring};
  extern __shared__ float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  const auto barrier = [&](int at) { return AddressOf(shared + ring.BarriersAt() + 8 * at); };
  const uint32_t* const signs = SignsOf(work, given);
  const int thread = static_cast<int>(threadIdx.x), ready = ring.Barriers() - 1;

  if (thread == 0) {
    for (int part = 0; part < ring.parts; ++part) {
      MakeBarrier(barrier(part), 32 * kPairBringers);
      MakeBarrier(barrier(ring.parts + part), 4 * ring.Tiles());
    }
    for (int piece = 2 * ring.parts; piece < ready; ++piece) MakeBarrier(barrier(piece), 1);
    MakeBarrier(barrier(ready), kMultiplying);
    *reinterpret_cast<uint4*>(shared + ring.ZerosAt()) = make_uint4(0, 0, 0, 0);
  }
  ShowToProducts();
  __syncthreads();
  WaitForPreviousLaunch();

  const int warp = UniformWarp();
  if (warp >= 4 * kRingMultipliers) {
    GiveRegisters<kBringerRegisters>();
    const uint32_t* const first = work.signs_last ? nullptr : signs;
    if (work.aligned) {
      BringPieces<Shape, true>(work, ring, shared, first);
    } else {
      BringPieces<Shape, false>(work, ring, shared, first);
    }
    return;
  }

  TakeRegisters<kMultiplierRegisters>();
  PlaceMatrices<Shape>(shared, ring, given, thread, kMultiplying);
  ClearColumns<Shape>(shared, ring, thread, kMultiplying);
  ShowToProducts();
  ArriveAt(barrier(ready));
  WaitAt(barrier(ready), 0);
  const SharedLines second(AddressOf(shared + ring.SecondAt()), ring.SecondEight());
  const int rows = static_cast<int>(work.count), blocks = static_cast<int>(work.runs);
  int row = static_cast<int>(blockIdx.x), part = 0, turn = 0;
  for (int tile = warp / 4;; tile += kRingMultipliers) {
    for (; tile >= ring.Tiles(); tile -= ring.Tiles()) {
      row += blocks;
      if (++part == ring.parts) part = 0, turn ^= 1;
    }
    if (row >= rows) break;
    const int first_a = 64 * tile + 16 * (warp % 4);
    const uint32_t* of_lane = reinterpret_cast<const uint32_t*>(shared + ring.SignsAt()) +
                              (first_a < ring.order ? first_a / 16 : 0) * ring.SignsOfRows() + Lane();
    SharedLines planes(AddressOf(shared + part * ring.Part()), ring.Eight());
    float sums[kWidth][Shape::kSums] = {};
    uint32_t word = 0;
    WaitAt(barrier(part), turn);
#pragma unroll 1
    for (int step = 0; step < ring.Steps(); ++step, planes = planes.Further(2 * kPairMatrix)) {
      if (step % 4 == 0) word = *of_lane, of_lane += 32;
      uint32_t operand[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) operand[i] = SignedOnes<T>(word << i);
      word <<= 4;
      BeginProducts();
      StartProduct<T>(sums, operand, planes, step > 0);
      CommitProduct();
      AwaitProducts<0>();
    }
    if (Lane() == 0) ArriveAt(barrier(ring.parts + part));

    Butterflies(sums);
    PairResults<Shape> results;
#pragma unroll
    for (int pair = 0; pair < kWidth / 2; ++pair) {
      float even[1][Shape::kSums] = {}, odd[1][Shape::kSums] = {};
      TransformColumns(even, sums[2 * pair], second);
      TransformColumns(odd, sums[2 * pair + 1], second);
#pragma unroll
      for (int i = 0; i < Shape::kSums; ++i)
        results[pair][i] = Pack<T>(even[0][i] * work.float_scale, odd[0][i] * work.float_scale);
    }
    if (first_a >= ring.order) continue;
    uint16_t* const y = static_cast<uint16_t*>(work.y) + row * work.n;
    const uint32_t* const last = work.signs_last ? signs : nullptr;
    if (!work.aligned) {
      Store<Shape, false, true>(results, y, work, first_a, last);
    } else if (last) {
      Store<Shape, true, true>(results, y, work, first_a, last);
    } else {
      Store<Shape, true, false>(results, y, work, first_a, nullptr);
    }
  }
}

#endif

// Empty where there are no warp groups.
template <typename Shape>
__global__ void __launch_bounds__(kRingThreads, 1) PairRing(const __grid_constant__ WorkAndWords<kManyWords> given) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  TransformPairs<Shape>(given.work, Generic(given.words));
#endif
}

template <typename T>
Kernel PairRingKernel(int width, int eights) {
  const auto make = [](auto shape) {
    Kernel kernel = {"ring of pairs", reinterpret_cast<const void*>(&PairRing<decltype(shape)>), kRingThreads, 0};
    kernel.words = kManyWords;
    return kernel;
  };
  if (width == 8) return make(PairShape<T, 8, 2, 3>{});
  return eights == 5 ? make(PairShape<T, 4, 1, 5>{}) : make(PairShape<T, 4, 1, 6>{});
}

}  // namespace jax_hadacore::cuda
