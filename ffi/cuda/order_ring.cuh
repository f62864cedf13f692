// order_ring.cuh: 16-bit rows of k * 2^m elements on sm_90a, in one pass. The steps are those of order_rows.cuh; here
// warp groups multiply, and rows come into a ring in shared memory while others are worked on.
#pragma once

#include "order_ring.h"
#include "order_rows.cuh"

namespace jax_hadacore::cuda {

// What a thread has: 512 threads begin with 128 registers each.
constexpr int kRingThreads = 128 * (kRingMultipliers + 1), kMultiplierRegisters = 152, kBringerRegisters = 56;
static_assert(kRingMultipliers * kMultiplierRegisters + kBringerRegisters == 4 * 128, "as many as there were");

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint4 Signed(uint4 v, PackedSigns<kGroup> signs) {
  return make_uint4(v.x ^ signs.Pair(0), v.y ^ signs.Pair(1), v.z ^ signs.Pair(2), v.w ^ signs.Pair(3));
}

template <bool kAligned>
__device__ __forceinline__ uint4 LoadGroup(const uint16_t* from) {
  if constexpr (kAligned) return *reinterpret_cast<const uint4*>(from);
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

// How rows come: by copies, which are only started, or by loads, after which they may get signs.
enum class Bring { kCopied, kAligned, kUnaligned };

// Brings rows to a part of the ring. Each of `warps` warps takes 8 a's of all columns in turn.
template <int kColumns, Bring kBring>
__device__ __forceinline__ void BringRows(char* part, const RingLayout& ring, const Rows& rows, const uint32_t* signs,
                                          int warp, int warps) {
  constexpr int kWide = Min(kColumns, 8), kOfLane = 8 * kColumns / 32;
  // Lines are as SharedColumns has them: the same for any 8 a's.
  int place[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int group = 32 * i + Lane(), j = group % kColumns, at = (group / kColumns * kWide + j % kWide) * 16;
    place[i] = j / kWide * ring.Plane() + (at ^ (at >> 7 & (kWide - 1)) << 4);
  }
  int a = 8 * warp;
  for (int r = 0; r < ring.RowsOfPart(); ++r, part += ring.Row(), a -= (ring.order + 7) / 8 * 8) {
    const uint16_t* const row = rows.x + min(r, rows.count - 1) * rows.n;  // the last one again for those beyond it
#pragma unroll 1
    for (; a < ring.order; a += 8 * warps) {
      const int element = (a * kColumns + Lane()) * kGroup, left = (ring.order - a) * kColumns - Lane();
      char* const to = part + a * ring.Line();
      if constexpr (kBring == Bring::kCopied) {
#pragma unroll
        for (int i = 0; i < kOfLane; ++i)
          if (32 * i < left) StartCopy<0>(to + place[i], row + element + 32 * i * kGroup);
      } else {
        uint4 v[kOfLane];
        PackedSigns<kGroup> of_group[kOfLane];
#pragma unroll
        for (int i = 0; i < kOfLane; ++i)
          if (32 * i < left) {
            v[i] = LoadGroup<kBring == Bring::kAligned>(row + element + 32 * i * kGroup);
            if (signs) of_group[i] = PackedSigns<kGroup>::From(signs, element + 32 * i * kGroup);
          }
#pragma unroll
        for (int i = 0; i < kOfLane; ++i)
          if (32 * i < left) *reinterpret_cast<uint4*>(to + place[i]) = Signed(v[i], of_group[i]);
      }
    }
  }
}

// The results' way out: a half of them, 8 a's, at a time to shared memory, then as whole lines.
template <typename T, int kColumns, bool kAligned, bool kSigned>
__device__ __forceinline__ void Store(const GroupSums<kRingGroups>& sums, char* own, const Rows& rows, const Work& work,
                                      int first_a, const uint32_t* signs) {
  constexpr int kStores = 8 * kRingGroups / 32, kApart = 32 / kRingGroups;  // a lane's, of a's so far apart
  constexpr int kLine = kRingGroups * 16;                                   // bytes
  const int lane = Lane(), a = lane / kRingGroups, group = lane % kRingGroups, row = group / kColumns;
  const int element = ((first_a + a) * kColumns + group % kColumns) * kGroup;
  const bool there = row < rows.count;
  // Pairs of groups change places with a's, so that lanes meet different banks both ways.
  const auto place = [](int a, int pair) { return a * kLine + (pair ^ a % 4) * 32; };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    SyncWarp();  // all have read what was there
#pragma unroll
    for (int pair = 0; pair < kRingGroups / 2; ++pair) {
      const float (&even)[4] = sums.of[2 * pair], (&odd)[4] = sums.of[2 * pair + 1];
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
    uint16_t* const to = rows.y + row * rows.n + element;
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
      const int further = 8 * half + i * kApart;
      if (there && first_a + a + further < work.order) StoreGroup<kAligned>(to + further * kColumns * kGroup, v[i]);
    }
  }
}

// A block takes parts in turn with the others. One warp group brings them, as the ring becomes free; the others take
// the tiles of parts that have come in turn, and wait for each other nowhere.
template <typename T, int kColumns>
__device__ __forceinline__ void TransformParts(const Work& work, const uint32_t* given) {
  const RingLayout ring = {kColumns, work.order, work.ring};
  extern __shared__ float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  char* const base = shared + (-reinterpret_cast<uintptr_t>(shared) & (RingLayout::kAlignment - 1));
  uint32_t* const words = reinterpret_cast<uint32_t*>(base + ring.WordsAt());
  const auto come = [&](int place) { return AddressOf(base + ring.BarriersAt() + 8 * place); };
  const auto read = [&](int place) { return AddressOf(base + ring.BarriersAt() + 8 * (ring.parts + place)); };
  const uint32_t* const signs = SignsOf(work, given);
  const int thread = static_cast<int>(threadIdx.x);

  const int count = ring.Padded() * ring.RowWords();
  for (int i = thread; i <= count; i += kRingThreads) words[i] = i < count ? given[i] : 0;
  // The elements of a's beyond the matrix stay as they are.
  const int missing = (ring.Padded() - ring.order) * ring.Line() / 16;
  for (int i = thread; i < missing * (ring.parts * ring.Part() / ring.Plane()); i += kRingThreads)
    reinterpret_cast<uint4*>(base + i / missing * ring.Plane() + ring.order * ring.Line())[i % missing] =
        make_uint4(0, 0, 0, 0);
  if (thread == 0)
    for (int place = 0; place < ring.parts; ++place) {
      MakeBarrier(come(place), 128);
      MakeBarrier(read(place), 4 * ring.Tiles());
    }
  ShowToProducts();
  __syncthreads();
  WaitForPreviousLaunch();

  const int parts = static_cast<int>((work.count + ring.RowsOfPart() - 1) / ring.RowsOfPart());
  const int blocks = static_cast<int>(work.runs), warp = UniformWarp();
  int part = static_cast<int>(blockIdx.x), place = 0, turn = 0;
  const auto next = [&] {
    part += blocks;
    if (++place == ring.parts) place = 0, turn ^= 1;
  };

  if (warp >= 4 * kRingMultipliers) {
    GiveRegisters<kBringerRegisters>();
    const uint32_t* const first = work.signs_last ? nullptr : signs;
    for (; part < parts; next()) {
      const Rows rows = RowsOfPart(work, part, ring.RowsOfPart());
      char* const to = base + place * ring.Part();
      WaitAt(read(place), turn ^ 1);
      if (work.aligned && !first) {
        BringRows<kColumns, Bring::kCopied>(to, ring, rows, nullptr, warp % 4, 4);
        ArriveAfterCopies(come(place));
        continue;
      }
      if (work.aligned) {
        BringRows<kColumns, Bring::kAligned>(to, ring, rows, first, warp % 4, 4);
      } else {
        BringRows<kColumns, Bring::kUnaligned>(to, ring, rows, first, warp % 4, 4);
      }
      ShowToProducts();
      ArriveAt(come(place));
    }
    FinishCopies();
  } else {
    TakeRegisters<kMultiplierRegisters>();
    char* const own = base + ring.ResultsAt() + warp * RingLayout::kResults;
    for (int tile = warp / 4;; tile += kRingMultipliers) {
      for (; tile >= ring.Tiles(); tile -= ring.Tiles()) next();
      if (part >= parts) break;
      const int first_a = 64 * tile + 16 * (warp % 4);
      SignsOfRows<T> matrix(words + (first_a < ring.order ? first_a : 0) * ring.RowWords(), ring.RowWords());
      SharedColumns<Min(kColumns, 8) * 16> b(AddressOf(base + place * ring.Part()),
                                             kColumns > 8 ? ring.Plane() : ring.Row());
      GroupSums<kRingGroups> sums;
      WaitAt(come(place), turn);
      ShowToProducts();
      uint32_t operand[2][4];
      int a = 0;
#pragma unroll 1
      for (; a + 16 < ring.order; a += 32, b = b.Below(32)) {
        matrix.Next(operand[0], 0);
        matrix.Next(operand[1], 16);
        BeginProducts();
        StartProduct<T>(sums.of, operand[0], b, a > 0);
        StartProduct<T>(sums.of, operand[1], b.Below(16), true);
        FinishProducts();
      }
      if (a < ring.order) {
        matrix.Next(operand[0], 0);
        BeginProducts();
        StartProduct<T>(sums.of, operand[0], b, a > 0);
        FinishProducts();
      }
      if (Lane() == 0) ArriveAt(read(place));
      if (first_a >= ring.order) continue;

      sums.TransformGroups();
      Butterflies<2, kColumns>(sums.of);
      const Rows rows = RowsOfPart(work, part, ring.RowsOfPart());
      const uint32_t* const last = work.signs_last ? signs : nullptr;
      if (!work.aligned) {
        Store<T, kColumns, false, true>(sums, own, rows, work, first_a, last);
      } else if (last) {
        Store<T, kColumns, true, true>(sums, own, rows, work, first_a, last);
      } else {
        Store<T, kColumns, true, false>(sums, own, rows, work, first_a, nullptr);
      }
    }
  }
}

#endif

// Empty where there are no warp groups.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kRingThreads, 1) OrderRing(const __grid_constant__ WorkAndWords<kManyWords> given) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  TransformParts<T, kColumns>(given.work, given.words);
#endif
}

template <typename T>
Kernel OrderRingKernel(int columns) {
  const auto function = columns == 16  ? reinterpret_cast<const void*>(&OrderRing<T, 16>)
                        : columns == 8 ? reinterpret_cast<const void*>(&OrderRing<T, 8>)
                                       : reinterpret_cast<const void*>(&OrderRing<T, 4>);
  Kernel kernel = {"ring of order rows", function, kRingThreads, 0};
  kernel.words = kManyWords;
  return kernel;
}

}  // namespace jax_hadacore::cuda
