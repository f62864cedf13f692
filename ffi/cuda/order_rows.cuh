// order_rows.cuh: 16-bit rows of k * 2^m elements, m >= 4, in one pass. The step of the order comes first, on the
// elements as they are, whose products with signs are exact; all that follows stays in the registers of one warp.
#pragma once

#include "order_stage.cuh"

namespace jax_hadacore::cuda {

// A row is an array of groups of 8 consecutive elements, (a, j): a is the index of the first step's matrix, which
// covers the order and the power of two's high bits, and j one of 2 to 32 columns. A warp computes 16 a's of 16
// columns, of one row or several; or of 32, if there are as many: then there are fewer a's, and so fewer products, but
// fewer warps have room on a multiprocessor.
constexpr int kGroup = 8;
constexpr int GroupsOfTask(int columns) { return columns == 32 ? 32 : 16; }
constexpr int OrderWarps(int columns) { return columns == 32 ? 6 : 8; }  // in a block, at most

// How many such blocks are to have registers on a multiprocessor. With 32 columns ptxas takes a few more on sm_100.
constexpr int OrderBlocks(int columns) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1000
  return columns == 32 ? 1 : 2;
#else
  static_cast<void>(columns);
  return 2;
#endif
}

// A group's place in shared memory: of its index's low three bits those that count columns are changed by higher ones,
// so that eight groups with the same j and consecutive a's are in different banks.
template <int kColumnBits>
struct GroupPlace {
  __device__ __forceinline__ int operator()(int element) const {
    constexpr int kShift = Max(kColumnBits, 3), kMask = Min((1 << kColumnBits) - 1, 7);
    return element ^ (element >> (kShift + 3) & kMask) << 3;
  }
};

// The second step transforms a group's three bits and the columns' lowest, by a matrix whose result columns are so
// ordered that a lane gets four consecutive elements, of two products two each.
__device__ __forceinline__ constexpr int ElementOf(int product, int column) {
  return (column & 1) | product << 1 | (column >> 1 & 1) << 2 | (column >> 2) << 3;
}

struct GroupMatrix {
  uint32_t of[2][2];

  __device__ __forceinline__ GroupMatrix() {
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      const int column = ElementOf(product, BColumn(Lane()));
#pragma unroll
      for (int r = 0; r < 2; ++r)
        of[product][r] = 0x3f803f80 ^ static_cast<uint32_t>(__popc(BRow(Lane(), r, 0) & column) & 1) << 15 ^
                         static_cast<uint32_t>(__popc(BRow(Lane(), r, 1) & column) & 1) << 31;
    }
  }
};

// The lane's sums: of each group four, as the tensor cores hold them.
template <int kGroups>
struct GroupSums {
  float of[kGroups][4] = {};

  __device__ __forceinline__ void TransformGroups() {
    const GroupMatrix matrix;  // computed anew, as registers are short before
#pragma unroll
    for (int group = 0; group < kGroups; group += 2) {
      const float (&even)[4] = of[group], (&odd)[4] = of[group + 1];
      const HiLo a[4] = {{even[0], even[1]}, {even[2], even[3]}, {odd[0], odd[1]}, {odd[2], odd[3]}};
      const uint32_t hi[4] = {a[0].hi, a[1].hi, a[2].hi, a[3].hi}, lo[4] = {a[0].lo, a[1].lo, a[2].lo, a[3].lo};
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        float (&sums)[4] = of[group + product];
        MatrixMultiplyAdd<BF16>(sums, lo, matrix.of[product][0], matrix.of[product][1], {});
        MatrixMultiplyAdd<BF16>(sums, hi, matrix.of[product][0], matrix.of[product][1], sums);
      }
    }
  }
};

// Sums of 16 a's from first_a on, of a task's first row on, of so many rows that lie in shared memory by GroupPlace;
// `behind` them are zeros, and `words` are the matrix.
template <typename T, int kColumnBits, int kGroups>
__device__ __forceinline__ void TransformTask(GroupSums<kGroups>& sums, const uint16_t* staged, const uint4* behind,
                                              const uint32_t* words, int order, int first_a, int first_row, int rows) {
  constexpr int kColumns = 1 << kColumnBits, kBytes = sizeof(uint16_t);
  const GroupPlace<kColumnBits> place;
  const int lane = Lane(), row_words = static_cast<int>(SignWords(order));
  // Step 1: operand A is the matrix. Operand B are the elements of two groups, a column each of two products, which
  // come in one instruction: lanes 0 to 15 name the first's a's, lanes 16 to 31 the second's.
  // Eight columns further on, a group's place is as much further.
  constexpr int kBases = kColumns >= 16 ? 4 : 8;
  SharedAddress from[kBases];
#pragma unroll
  for (int pair = 0; pair < kBases; ++pair) {
    const int row = min(first_row + 2 * pair / kColumns, rows - 1), j = 2 * pair % kColumns + lane / 16;
    from[pair] = AddressOf(staged + place(((row * order + lane % 16) * kColumns + j) * kGroup));
  }
  SignsOfRows<T> matrix(words + first_a * row_words, row_words);
  int a = 0;
  do {
    if (a + 16 > order && a + lane % 16 >= order)
#pragma unroll
      for (SharedAddress& address : from) address = AddressOf(behind);
    uint32_t operand[4];
    matrix.Next(operand, a);
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      float (&even)[4] = sums.of[2 * pair], (&odd)[4] = sums.of[2 * pair + 1];
      uint32_t b[4];
      LoadMatrices(b, from[pair % kBases] + pair / kBases * 8 * kGroup * kBytes);
      MatrixMultiplyAdd<T>(even, operand, b[0], b[1], even);
      MatrixMultiplyAdd<T>(odd, operand, b[2], b[3], odd);
    }
#pragma unroll
    for (SharedAddress& address : from) address += 16 * kColumns * kGroup * kBytes;
  } while ((a += 16) < order);

  sums.TransformGroups();
  Butterflies<2, kColumns>(sums.of);  // the columns' other bits
}

// Stores a task's results. kAligned: the rows are. kSigned: they may have signs.
template <typename T, int kColumns, bool kAligned, bool kSigned, int kGroups>
__device__ __forceinline__ void Store(const GroupSums<kGroups>& sums, const Rows& rows, const Work& work, int first_a,
                                      int first_row, const uint32_t* signs) {
  const int lane = Lane(), at = ((first_a + lane / 4) * kColumns + lane % 4 / 2) * kGroup + lane % 2 * 4;
  // A half's words before its first store, which no load of theirs can be moved across: one for four columns.
  constexpr int kColumnsOfWord = Min(kColumns, 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first_a + CRow(lane, 2 * half) >= work.order) return;
    const int of_half = 8 * half * kColumns * kGroup;
    uint32_t words[kColumns / kColumnsOfWord] = {};
    if (kSigned && signs)
#pragma unroll
      for (int j = 0; j < kColumns; j += kColumnsOfWord)
        words[j / kColumnsOfWord] = signs[static_cast<unsigned>(at) / 32 + (of_half + j * kGroup) / 32];
    uint16_t* to = rows.y + first_row * rows.n + at + of_half;
#pragma unroll
    for (int row = 0; row < kGroups / kColumns; ++row, to += rows.n) {
      if (row > 0 && first_row + row >= rows.count) break;
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        const float (&even)[4] = sums.of[row * kColumns + j], (&odd)[4] = sums.of[row * kColumns + j + 1];
        const float v[4] = {even[2 * half], even[2 * half + 1], odd[2 * half], odd[2 * half + 1]};
        const auto of_results = PackedSigns<4>::In(words[j / kColumnsOfWord], at + j * kGroup);
        StoreResults<T, kAligned>(to + j * kGroup, v, work.float_scale, of_results);
      }
    }
  }
}

template <typename T, int kColumnBits, int kWords>
__global__ void __launch_bounds__(32 * OrderWarps(1 << kColumnBits), OrderBlocks(1 << kColumnBits))
    OrderRows(const __grid_constant__ WorkAndWords<kWords> given) {
  constexpr int kColumns = 1 << kColumnBits, kGroups = GroupsOfTask(kColumns), kRowsOfTask = kGroups / kColumns;
  const Work& work = given.work;
  const uint32_t* const words = Generic(given.words);
  extern __shared__ float4 shared_memory[];
  uint16_t* const staged = reinterpret_cast<uint16_t*>(shared_memory);

  const Rows rows(work);
  const uint32_t* const signs = SignsOf(work, given.words);
  const GroupPlace<kColumnBits> place;
  // Behind the rows are the elements of a's beyond the matrix, for the groups of all columns.
  uint4* const behind = reinterpret_cast<uint4*>(staged + work.per_block * rows.n);
  if (threadIdx.x < kColumns) behind[threadIdx.x] = make_uint4(0, 0, 0, 0);
  WaitForPreviousLaunch();
  StageRows(staged, rows, work, signs, place);

  const int order = work.order, tiles = (order + 15) / 16;
  const int parts = (rows.count + kRowsOfTask - 1) / kRowsOfTask, warps = static_cast<int>(blockDim.x) / 32;
  int tile = static_cast<int>(threadIdx.x) / 32;
  for (int part = 0;; tile += warps) {
    for (; tile >= tiles; ++part) tile -= tiles;
    if (part >= parts) break;
    const int first_a = 16 * tile, first_row = part * kRowsOfTask;

    GroupSums<kGroups> sums;
    TransformTask<T, kColumnBits>(sums, staged, behind, words, order, first_a, first_row, rows.count);

    const uint32_t* const last = work.signs_last ? signs : nullptr;
    if (!work.aligned) {
      Store<T, kColumns, false, true>(sums, rows, work, first_a, first_row, last);
    } else if (last) {
      Store<T, kColumns, true, true>(sums, rows, work, first_a, first_row, last);
    } else {
      Store<T, kColumns, true, false>(sums, rows, work, first_a, first_row, nullptr);
    }
  }
}

template <typename T, int kColumnBits>
Kernel MakeOrderRowsKernel(int words) {
  const bool few = words < kFewWords;
  const auto function = few ? reinterpret_cast<const void*>(&OrderRows<T, kColumnBits, kFewWords>)
                            : reinterpret_cast<const void*>(&OrderRows<T, kColumnBits, kManyWords>);
  Kernel kernel = {"order rows", function, 32 * OrderWarps(1 << kColumnBits), 0};
  kernel.words = few ? kFewWords : kManyWords;
  return kernel;
}

template <typename T>
Kernel OrderRowsKernel(int column_bits, int words) {
  switch (column_bits) {
    case 1: return MakeOrderRowsKernel<T, 1>(words);
    case 2: return MakeOrderRowsKernel<T, 2>(words);
    case 3: return MakeOrderRowsKernel<T, 3>(words);
    case 4: return MakeOrderRowsKernel<T, 4>(words);
    default: return MakeOrderRowsKernel<T, 5>(words);
  }
}

}  // namespace jax_hadacore::cuda
