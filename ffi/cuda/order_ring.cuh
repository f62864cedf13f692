// order_ring.cuh: 16-bit rows of k * 2^m elements on sm_90a, in one pass. The steps are those of order_rows.cuh; here
// warp groups multiply, and rows come into a ring in shared memory while others are worked on.
#pragma once

#include "order_ring.h"
#include "quantized_orders.cuh"

namespace jax_hadacore::cuda {

// What a thread has: 512 threads begin with 128 registers each.
constexpr int kRingThreads = 128 * (kRingMultipliers + 1), kMultiplierRegisters = 152, kBringerRegisters = 56;
static_assert(kRingMultipliers * kMultiplierRegisters + kBringerRegisters == 4 * 128, "as many as there were");

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint4 Signed(uint4 v, PackedSigns<kGroup> signs) {
  return make_uint4(v.x ^ signs.Pair(0), v.y ^ signs.Pair(1), v.z ^ signs.Pair(2), v.w ^ signs.Pair(3));
}

__device__ __forceinline__ uint4 LoadGroup(const uint16_t* from) {
  const auto pair = [&](int i) { return from[2 * i] | static_cast<uint32_t>(from[2 * i + 1]) << 16; };
  return make_uint4(pair(0), pair(1), pair(2), pair(3));
}

template <bool kAligned>
__device__ __forceinline__ void StoreGroup(uint16_t* to, uint4 v) {
  if constexpr (kAligned) {
    StoreWords(to, v.x, v.y, v.z, v.w);
  } else {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
  }
}

// A part's rows.
__device__ __forceinline__ Rows RowsOfPart(const Work& work, int part, int rows_of_part) {
  Rows rows(work);
  const int64_t first = static_cast<int64_t>(part) * rows_of_part;
  rows.x = static_cast<const uint16_t*>(work.x) + first * rows.n;
  rows.y = static_cast<uint16_t*>(work.y) + first * rows.n;
  rows.count = static_cast<int>(min(static_cast<int64_t>(rows_of_part), work.count - first));
  return rows;
}

// Calls body(row, at, place, element, left) for all groups of a part's rows, those of 8 a's at a time, which `warps`
// warps take in turn. The lane's groups 32 i are at + place[i] in the part and begin with element + 32 i kGroup of the
// row; they are there where 32 i < left.
template <int kColumns, typename Body>
__device__ __forceinline__ void ForGroups(const RingLayout& ring, int warp, int warps, const Body& body) {
  constexpr int kWide = Min(kColumns, 8), kOfLane = 8 * kColumns / 32;
  // Lines are as SharedColumns has them: the same for any 8 a's.
  int place[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int group = 32 * i + Lane(), j = group % kColumns, at = (group / kColumns * kWide + j % kWide) * 16;
    place[i] = j / kWide * ring.Plane() + (at ^ (at >> 7 & (kWide - 1)) << 4);
  }
  int a = 8 * warp;
  for (int row = 0; row < ring.RowsOfPart(); ++row, a -= (ring.order + 7) / 8 * 8)
#pragma unroll 2
    for (; a < ring.order; a += 8 * warps)
      body(row, row * ring.Row() + a * ring.Line(), place, (a * kColumns + Lane()) * kGroup,
           (ring.order - a) * kColumns - Lane());
}

// Gives a part's rows their signs.
template <int kColumns>
__device__ __forceinline__ void SignRows(char* part, const RingLayout& ring, const uint32_t* signs, int warp,
                                         int warps) {
  ForGroups<kColumns>(ring, warp, warps, [&](int, int at, const auto& place, int element, int left) {
    constexpr int kOfLane = 8 * kColumns / 32;
    uint4 v[kOfLane];
    PackedSigns<kGroup> of_group[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (32 * i < left) {
        of_group[i] = PackedSigns<kGroup>::From(signs, element + 32 * i * kGroup);
        v[i] = *reinterpret_cast<const uint4*>(part + at + place[i]);
      }
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (32 * i < left) *reinterpret_cast<uint4*>(part + at + place[i]) = Signed(v[i], of_group[i]);
  });
}

// Loads unaligned rows to a part, and gives them their signs, if there are some.
template <int kColumns>
__device__ __forceinline__ void LoadRows(char* part, const RingLayout& ring, const Rows& rows, const uint32_t* signs,
                                         int warp, int warps) {
  ForGroups<kColumns>(ring, warp, warps, [&](int row, int at, const auto& place, int element, int left) {
    const uint16_t* const from = rows.x + min(row, rows.count - 1) * rows.n + element;  // the last one again
#pragma unroll
    for (int i = 0; i < 8 * kColumns / 32; ++i)
      if (32 * i < left) {
        uint4 v = LoadGroup(from + 32 * i * kGroup);
        if (signs) v = Signed(v, PackedSigns<kGroup>::From(signs, element + 32 * i * kGroup));
        *reinterpret_cast<uint4*>(part + at + place[i]) = v;
      }
  });
}

// The results' way out: 8 a's of kTogether groups at a time to shared memory, then as whole lines.
template <typename T, int kColumns, int kTogether, bool kAligned, bool kSigned>
__device__ __forceinline__ void Store(const GroupSums<kRingGroups>& sums, char* own, const Rows& rows, const Work& work,
                                      int first_a, const uint32_t* signs) {
  constexpr int kStores = 8 * kTogether / 32, kApart = 32 / kTogether;  // a lane's, of a's so far apart
  constexpr int kLine = kTogether * 16;                                 // bytes
  const int lane = Lane(), a = lane / kTogether, group = lane % kTogether;
  // Pairs of groups change places with a's, so that lanes meet different banks both ways.
  const auto place = [](int a, int pair) { return a * kLine + (pair ^ a % 4) * 32; };
#pragma unroll
  for (int first = 0; first < kRingGroups; first += kTogether) {
    const int row = (first + group) / kColumns;
    const int element = ((first_a + a) * kColumns + (first + group) % kColumns) * kGroup;
    const bool there = row < rows.count;
    uint16_t* const to = rows.y + row * rows.n + element;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SyncWarp();  // all have read what was there
#pragma unroll
      for (int pair = 0; pair < kTogether / 2; ++pair) {
        const float (&even)[4] = sums.of[first + 2 * pair], (&odd)[4] = sums.of[first + 2 * pair + 1];
        const float v[4] = {even[2 * half], even[2 * half + 1], odd[2 * half], odd[2 * half + 1]};
        *reinterpret_cast<uint2*>(own + place(lane / 4, pair) + lane % 4 * 8) =
            make_uint2(Pack<T>(v[0] * work.float_scale, v[1] * work.float_scale),
                       Pack<T>(v[2] * work.float_scale, v[3] * work.float_scale));
      }
      SyncWarp();
      uint4 v[kStores];
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
        v[i] = *reinterpret_cast<const uint4*>(own + place(i * kApart + a, group / 2) + group % 2 * 16);
        const int at = element + (8 * half + i * kApart) * kColumns * kGroup;
        if (kSigned && signs && at < rows.n) v[i] = Signed(v[i], PackedSigns<kGroup>::From(signs, at));
      }
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
        const int further = 8 * half + i * kApart;
        if (there && first_a + a + further < work.order) StoreGroup<kAligned>(to + further * kColumns * kGroup, v[i]);
      }
    }
  }
}

// Makes the matrix in shared memory of its words, 8 columns at a time, which `warps` warps take in turn.
template <typename T>
__device__ __forceinline__ void ExpandMatrix(char* to, const RingLayout& ring, const uint32_t* words, int warp,
                                             int warps) {
  constexpr uint32_t kOnes = std::is_same_v<T, F16> ? 0x3c003c00 : 0x3f803f80;
  for (int column = 8 * warp; column < ring.Padded(); column += 8 * warps)
    for (int row = Lane(); row < ring.Padded(); row += 32)
      *reinterpret_cast<uint4*>(to + (column / 8 * ring.Padded() + row) * 16) = Signed(
          make_uint4(kOnes, kOnes, kOnes, kOnes), PackedSigns<kGroup>::From(words + row * ring.RowWords(), column));
}

// The products of a tile, with the matrix as elements in shared memory.
template <typename T, int kLine>
__device__ __forceinline__ void Multiply(GroupSums<kRingGroups>& sums, SharedMatrix matrix, SharedColumns<kLine> b,
                                         const RingLayout& ring) {
  BeginProducts();
#pragma unroll 1
  for (int a = 0; a < ring.order; a += 16, b = b.Below(16), matrix = matrix.Right(16)) {
    StartProduct<T>(sums.of, matrix, b, a > 0);
    CommitProduct();
  }
  AwaitProducts<0>();
}

// The same with words, of which a product's operand is made while the one before it runs.
template <typename T, int kLine>
__device__ __forceinline__ void Multiply(GroupSums<kRingGroups>& sums, SignsOfRows<T> matrix, SharedColumns<kLine> b,
                                         const RingLayout& ring) {
  uint32_t operand[2][4];
#pragma unroll 1
  for (int a = 0; a < ring.order; a += 32, b = b.Below(32)) {
    matrix.Next(operand[0], 0);
    BeginProducts();
    StartProduct<T>(sums.of, operand[0], b, a > 0);
    CommitProduct();
    AwaitProducts<1>();
    if (a + 16 >= ring.order) break;
    matrix.Next(operand[1], 16);
    BeginProducts();
    StartProduct<T>(sums.of, operand[1], b.Below(16), true);
    CommitProduct();
    AwaitProducts<1>();
  }
  AwaitProducts<0>();
}

// The codes of a tile of a part, which is a row. Its warps wait for each other's spans where it has one scale: each
// tile is another warp group's, and has results of all four or fewer warps, so that none is a turn ahead.
template <Formats kFormats>
__device__ __forceinline__ void StoreCodes(const GroupSums<kRingGroups>& sums, char* base, const RingLayout& ring,
                                           const Work& work, int part, int place, int turn, int first_a) {
  const int own_a = first_a + Lane() / 4;
  const int64_t first = part * work.n + own_a * kOfA;
  if constexpr (kFormats != Formats::kOfRows) {
    StoreCodesOfGroups<kFormats>(sums, work, own_a, first);
  } else {
    static_assert(sizeof(Span) == RingLayout::kSpan);
    Span* const spans = reinterpret_cast<Span*>(base + ring.SpansAt()) + (turn * ring.parts + place) * ring.Spans();
    const SharedAddress known = AddressOf(base + ring.KnownAt() + 8 * place);
    StoreCodesOfRow(sums, work, part, own_a, first, [&](const Span& span) {
      if (Lane() == 0) {
        spans[first_a / 16] = span;
        ArriveAt(known);
      }
      WaitAt(known, turn);
      return spans[Lane() < ring.Spans() ? Lane() : 0];
    });
  }
}

// A block takes parts in turn with the others. One warp group brings them, as the ring becomes free; the others take
// the tiles of parts that have come in turn, and wait for each other nowhere but in StoreCodes. Out is T, or says that
// results become codes.
template <typename T, typename Out, int kColumns, int kTogether, bool kElements>
__device__ __forceinline__ void TransformParts(const Work& work, const uint32_t* given) {
  const RingLayout ring = {kColumns, work.order, kTogether, kElements, work.ring};
  extern __shared__ float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  char* const base = shared + (-reinterpret_cast<uintptr_t>(shared) & (RingLayout::kAlignment - 1));
  const uint32_t *const signs = SignsOf(work, given), *const first = work.signs_last ? nullptr : signs;
  const int thread = static_cast<int>(threadIdx.x);

  // The turns of a part's place: it has been read; rows have been brought; they may be read.
  const auto barrier = [&](int i) { return AddressOf(base + ring.BarriersAt() + 8 * i); };
  const auto read = [&](int place) { return barrier(3 * place); };
  const auto brought = [&](int place) { return barrier(3 * place + 1); };
  const auto ready = [&](int place) { return barrier(3 * place + (work.aligned && !first ? 1 : 2)); };
  const SharedAddress made = barrier(3 * ring.parts);
  const int bringers = work.aligned ? 3 : 4;  // warps that sign rows or load them

  if (thread < 3 * ring.parts) {
    const int which = thread % 3;
    MakeBarrier(barrier(thread), which == 0 ? 4 * ring.Tiles() : which == 1 ? 1 : 32 * bringers);
  } else if (thread == 3 * ring.parts) {
    MakeBarrier(made, 128 * kRingMultipliers);
  }
  if constexpr (kIsQuantized<Out>)
    if (thread < ring.parts) MakeBarrier(AddressOf(base + ring.KnownAt() + 8 * thread), ring.Spans());
  if (!work.aligned) {  // the elements of a's beyond the matrix stay as they are; boxes have zeros there
    const int missing = (ring.Padded() - ring.order) * ring.Line() / 16;
    for (int i = thread; i < missing * (ring.parts * ring.Part() / ring.Plane()); i += kRingThreads)
      reinterpret_cast<uint4*>(base + i / missing * ring.Plane() + ring.order * ring.Line())[i % missing] =
          make_uint4(0, 0, 0, 0);
  }
  ShowToProducts();
  __syncthreads();

  const int parts = static_cast<int>((work.count + ring.RowsOfPart() - 1) / ring.RowsOfPart());
  const int blocks = static_cast<int>(work.runs), warp = UniformWarp();
  int part = static_cast<int>(blockIdx.x), place = 0, turn = 0;
  const auto next = [&] {
    part += blocks;
    if (++place == ring.parts) place = 0, turn ^= 1;
  };

  if (warp >= 4 * kRingMultipliers) {
    GiveRegisters<kBringerRegisters>();
    WaitForPreviousLaunch();
    const int bringer = warp - 4 * kRingMultipliers;
    if (!work.aligned) {
      for (; part < parts; next()) {
        WaitAt(read(place), turn ^ 1);
        LoadRows<kColumns>(base + place * ring.Part(), ring, RowsOfPart(work, part, ring.RowsOfPart()), first, bringer,
                           bringers);
        ShowToProducts();
        ArriveAt(ready(place));
      }
    } else if (bringer == bringers) {
      const uint32_t* const map = Generic(given);
      for (; Lane() == 0 && part < parts; next()) {
        WaitAt(read(place), turn ^ 1);
        // A warp group that waits for a turn has to know of the one before, and knows of the part that it had last. So
        // rows come in this order, as far as it matters: boxes alone may overtake each other.
        const int stride = TileStride(ring.Tiles()), other = place + stride;
        if (stride < ring.parts) WaitAt(brought(other % ring.parts), other < ring.parts ? turn ^ 1 : turn);
        ArriveAndExpect(brought(place), ring.Part());
        for (int plane = 0; plane < ring.RowsOfPart() * ring.Planes(); ++plane)
          for (int a = 0; a < ring.Padded(); a += ring.Box())
            BringBox(AddressOf(base + place * ring.Part() + plane * ring.Plane() + a * ring.Line()), map, a,
                     plane % ring.Planes(), part * ring.RowsOfPart() + plane / ring.Planes(), brought(place));
      }
    } else if (first) {
      for (; part < parts; next()) {
        WaitAt(brought(place), turn);
        SignRows<kColumns>(base + place * ring.Part(), ring, first, bringer, bringers);
        ShowToProducts();
        ArriveAt(ready(place));
      }
    }
  } else {
    TakeRegisters<kMultiplierRegisters>();
    // The words come to their place, or to that of results, where their elements are made of them.
    char* const matrix_at = base + ring.MatrixAt();
    uint4* const words = reinterpret_cast<uint4*>(kElements ? base + ring.ResultsAt() : matrix_at);
    const uint4* const words_given = reinterpret_cast<const uint4*>(Generic(given) + kMapWords);
    for (int i = thread; i <= ring.Padded() * ring.RowWords() / 4; i += 128 * kRingMultipliers)
      words[i] = words_given[i];
    if constexpr (kElements) {
      ArriveAt(made);
      WaitAt(made, 0);
      ExpandMatrix<T>(matrix_at, ring, reinterpret_cast<const uint32_t*>(words), warp, 4 * kRingMultipliers);
      ShowToProducts();
    }
    ArriveAt(made);
    WaitAt(made, kElements);
    WaitForPreviousLaunch();

    char* const own = base + ring.ResultsAt() + warp * ring.Results();
    for (int tile = warp / 4;; tile += kRingMultipliers) {
      for (; tile >= ring.Tiles(); tile -= ring.Tiles()) next();
      if (part >= parts) break;
      // A warp's scheduler is always the same: what the last tile has is left to other warps from part to part.
      const int slack = tile + 1 == ring.Tiles() ? ring.Slack() : 0, visit = place + turn;
      const int tile_a = 64 * tile - 16 * (slack == 3 ? visit % 4 : visit % 2 * slack);
      const int first_a = tile_a + 16 * (warp % 4);
      const SharedColumns<Min(kColumns, 8) * 16> b(AddressOf(base + place * ring.Part()),
                                                   kColumns > 8 ? ring.Plane() : ring.Row());
      GroupSums<kRingGroups> sums;
      if constexpr (kElements) {
        const SharedMatrix matrix(AddressOf(matrix_at), ring.Padded(), tile_a);
        WaitAt(ready(place), turn);
        Multiply<T>(sums, matrix, b, ring);
      } else {
        const uint32_t* const rows = reinterpret_cast<const uint32_t*>(matrix_at);
        const SignsOfRows<T> matrix(rows + min(first_a, ring.Padded() - 16) * ring.RowWords(), ring.RowWords());
        WaitAt(ready(place), turn);
        Multiply<T>(sums, matrix, b, ring);
      }
      if (Lane() == 0) ArriveAt(read(place));
      if (first_a < 64 * tile || first_a >= ring.order) continue;

      sums.TransformGroups();
      Butterflies<2, kColumns>(sums.of);
      if constexpr (kIsQuantized<Out>) {
        StoreCodes<Out::kFormats>(sums, base, ring, work, part, place, turn, first_a);
      } else {
        const Rows rows = RowsOfPart(work, part, ring.RowsOfPart());
        const uint32_t* const last = work.signs_last ? signs : nullptr;
        if (!work.aligned) {
          Store<T, kColumns, kTogether, false, true>(sums, own, rows, work, first_a, last);
        } else if (last) {
          Store<T, kColumns, kTogether, true, true>(sums, own, rows, work, first_a, last);
        } else {
          Store<T, kColumns, kTogether, true, false>(sums, own, rows, work, first_a, nullptr);
        }
      }
    }
  }
}

#endif

// Empty where there are no warp groups.
template <typename T, int kColumns, int kTogether, bool kElements>
__global__ void __launch_bounds__(kRingThreads, 1) OrderRing(const __grid_constant__ WorkAndWords<kManyWords> given) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  TransformParts<T, T, kColumns, kTogether, kElements>(given.work, given.words);
#endif
}

template <typename T, Formats kFormats>
__global__ void __launch_bounds__(kRingThreads, 1)
    QuantizedRing(const __grid_constant__ WorkAndWords<kManyWords> given) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  TransformParts<T, Quantized<kFormats>, kMostRingColumns, kTogetherForCodes, true>(given.work, given.words);
#endif
}

template <typename T, bool kElements>
const void* OrderRingFunction(int columns, int together) {
  if (columns == 4) return reinterpret_cast<const void*>(&OrderRing<T, 4, 8, kElements>);
  if (columns == 8) return reinterpret_cast<const void*>(&OrderRing<T, 8, 8, kElements>);
  return together == 8 ? reinterpret_cast<const void*>(&OrderRing<T, 16, 8, kElements>)
                       : reinterpret_cast<const void*>(&OrderRing<T, 16, 16, kElements>);
}

template <typename T>
Kernel OrderRingKernel(const RingLayout& ring) {
  const auto function = ring.elements ? OrderRingFunction<T, true> : OrderRingFunction<T, false>;
  Kernel kernel = {"ring of order rows", function(ring.columns, ring.together), kRingThreads, 0};
  kernel.words = kManyWords;
  return kernel;
}

template <typename T>
Kernel QuantizedRingKernel(Formats formats) {
  return KernelFor(formats, [](auto known) {
    const auto function = &QuantizedRing<T, known()>;
    Kernel kernel = {"ring of order rows to codes", reinterpret_cast<const void*>(function), kRingThreads, 0};
    kernel.words = kManyWords;
    return kernel;
  });
}

}  // namespace jax_hadacore::cuda
