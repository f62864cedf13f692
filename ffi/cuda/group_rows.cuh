// group_rows.cuh: 16-bit rows of k * 2^m elements, m <= 3, and of k * l * 2^m with two orders, in one pass. As in
// order_rows.cuh the first step comes on the elements as they are, and what follows in the registers of one warp.
#pragma once

#include "order_stage.cuh"

namespace jax_hadacore::cuda {

// A row is an array of groups of kWidth consecutive elements, (j, a): a is the index of the first step's matrix, which
// covers one order and the power of two's high bits, and j that of the other order, if there is one, whose matrix is
// multiplied in the second step. A warp computes 16 a's of 8 kTiles columns: of all j's, or of that many rows.
template <typename T_, int kWidth_, int kTiles_, bool kTwoOrders_>
struct GroupShape {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kTiles = kTiles_;
  static constexpr bool kTwoOrders = kTwoOrders_;
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kWarps = kTiles > 2 ? 4 : kWidth == 8 ? 6 : 8;  // in a block, at most
  static constexpr int kWordsOfColumn = (kColumns + 31) / 32;          // of the second matrix
};

// The groups (j, a) and (j, a + 1), as they come.
template <int kWidth>
struct GroupPair {
  uint32_t words[kWidth];

  // Element i of both, packed.
  __device__ __forceinline__ uint32_t Element(int i) const {
    if constexpr (kWidth == 1) return words[0];
    return __byte_perm(words[i / 2], words[kWidth / 2 + i / 2], i % 2 ? 0x7632 : 0x5410);
  }

  __device__ __forceinline__ void Load(const uint16_t* from) {
    if constexpr (kWidth == 1) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kWidth == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      words[0] = v.x, words[1] = v.y;
    } else {
      Set<0>(reinterpret_cast<const uint4*>(from)[0]);
      if constexpr (kWidth == 8) Set<4>(reinterpret_cast<const uint4*>(from)[1]);
    }
  }

 private:
  template <int kFirst>
  __device__ __forceinline__ void Set(uint4 v) {
    words[kFirst] = v.x, words[kFirst + 1] = v.y, words[kFirst + 2] = v.z, words[kFirst + 3] = v.w;
  }
};

// The lane's sums: of `tile` and element `i` of a group four, as the tensor cores hold them.
template <typename Shape>
struct ColumnSums {
  float of[Shape::kTiles][Shape::kWidth][4] = {};

  // Multiplies the columns by the second matrix, whose rows are at `words`.
  __device__ __forceinline__ void TransformColumns(const uint32_t* words, int columns) {
    constexpr int kTiles = Shape::kTiles, kWords = Shape::kWordsOfColumn;
    words += BColumn(Lane()) * kWords;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      if (8 * tile + CColumn(Lane(), 0) >= columns)
#pragma unroll
        for (float (&sums)[4] : of[tile])
#pragma unroll
          for (float& sum : sums) sum = 0;
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) {
      uint32_t hi[2 * kTiles], lo[2 * kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const HiLo sum(of[tile][i][2 * half], of[tile][i][2 * half + 1]);
          hi[2 * tile + half] = sum.hi;
          lo[2 * tile + half] = sum.lo;
        }
      KeepOutOfRegisters(words);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float (&sums)[4] = of[tile][i];
#pragma unroll
        for (float& sum : sums) sum = 0;
#pragma unroll
        for (int step = 0; step < kTiles / 2; ++step) {
          const uint32_t word = words[8 * tile * kWords + step / 2];
          const int pair = step % 2 * 8 + BRow(Lane(), 0, 0) / 2;
          const uint32_t b0 = SignedOnes<BF16>(PairSigns(word, pair)), b1 = SignedOnes<BF16>(PairSigns(word, pair + 4));
          const uint32_t low[4] = {lo[4 * step], lo[4 * step + 1], lo[4 * step + 2], lo[4 * step + 3]};
          const uint32_t high[4] = {hi[4 * step], hi[4 * step + 1], hi[4 * step + 2], hi[4 * step + 3]};
          MatrixMultiplyAdd<BF16>(sums, low, b0, b1, sums);
          MatrixMultiplyAdd<BF16>(sums, high, b0, b1, sums);
        }
      }
    }
  }

  __device__ __forceinline__ void TransformGroups() {
#pragma unroll
    for (int h = 1; h < Shape::kWidth; h *= 2)
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i)
        if (!(i & h))
#pragma unroll
          for (int tile = 0; tile < Shape::kTiles; ++tile)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float a = of[tile][i][c], b = of[tile][i + h][c];
              of[tile][i][c] = a + b;
              of[tile][i + h][c] = a - b;
            }
  }
};

// Stores a task's results: groups of `columns` columns from `first` of the rows on. kAligned: the rows are. kSigned:
// they may have signs.
template <typename Shape, bool kAligned, bool kSigned>
__device__ __forceinline__ void Store(const ColumnSums<Shape>& sums, const Rows& rows, const Work& work, int first,
                                      int first_a, int columns, const uint32_t* signs) {
  constexpr int kWidth = Shape::kWidth, kTiles = Shape::kTiles;
  const int column_elements = work.order * kWidth;
  const int column = CColumn(Lane(), 0), a = first_a + CRow(Lane(), 0);
  // All words before a store, which no load of theirs can be moved across. With two orders, eight columns further on
  // are as many whole words.
  PackedSigns<kWidth> of_results[4][kTiles];
  if (kSigned && signs)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const unsigned at = (a + c / 2 * 8) * kWidth + (Shape::kTwoOrders ? (column + c % 2) * column_elements : 0);
      if (a + c / 2 * 8 < work.order)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          if (!Shape::kTwoOrders || column + 8 * tile + c % 2 < columns)
            of_results[c][tile] =
                PackedSigns<kWidth>::From(signs + (Shape::kTwoOrders ? tile * column_elements / 4 : 0), at);
    }
  uint16_t* const to = rows.y + first + column * column_elements + a * kWidth;
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (a + c / 2 * 8 < work.order)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int further = 8 * tile + c % 2;
        if (column + further >= columns) continue;
        float v[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) v[i] = sums.of[tile][i][c];
        const int offset = c / 2 * 8 * kWidth;
        StoreResults<typename Shape::T, kAligned>(to + further * column_elements + offset, v, work.float_scale,
                                                  of_results[c][tile]);
      }
}

template <typename Shape>
__global__ void __launch_bounds__(32 * Shape::kWarps, 2)
    GroupRows(const __grid_constant__ WorkAndWords<kManyWords> given) {
  using T = typename Shape::T;
  constexpr int kWidth = Shape::kWidth, kTiles = Shape::kTiles;
  const Work& work = given.work;
  const uint32_t* const words = Generic(given.words);
  extern __shared__ float4 shared_memory[];
  uint16_t* const staged = reinterpret_cast<uint16_t*>(shared_memory);
  const Rows rows(work);
  const uint32_t* const signs = SignsOf(work, given.words);
  WaitForPreviousLaunch();
  StageRows(staged, rows, work, signs, [](int element) { return element; });

  const int lane = Lane(), order = work.order, row_words = static_cast<int>(SignWords(order));
  const int tiles = (order + 15) / 16, column_elements = order * kWidth;
  const int parts = Shape::kTwoOrders ? rows.count : (rows.count + Shape::kColumns - 1) / Shape::kColumns;
  for (int task = static_cast<int>(threadIdx.x) / 32; task < tiles * parts; task += static_cast<int>(blockDim.x) / 32) {
    const int part = task / tiles, first_a = (task - part * tiles) * 16;
    // The task's columns are those of a row, or rows.
    const int columns = Shape::kTwoOrders ? work.columns : min(rows.count - part * Shape::kColumns, Shape::kColumns);
    const int first = part * (Shape::kTwoOrders ? work.columns : Shape::kColumns) * column_elements;

    // Step 1: operand A is the matrix, operand B the elements, of which a lane loads whole groups. What is beyond the
    // matrix or the columns is taken from the same column or row, times zero or left out.
    const int column = min(BColumn(lane), columns - 1);
    const uint16_t* const from = staged + first + column * column_elements;
    ColumnSums<Shape> sums;
    SignsOfRows<T> matrix(words + first_a * row_words, row_words);
    int a = 0;
    do {
      uint32_t operand[4];
      matrix.Next(operand, a);
      int at[2] = {a + BRow(lane, 0, 0), a + BRow(lane, 1, 0)};
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (at[r] >= order) at[r] = operand[2 * r] = operand[2 * r + 1] = 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int further = min(8 * tile, columns - 1 - column) * column_elements;
        GroupPair<kWidth> low, high;
        low.Load(from + further + at[0] * kWidth);
        high.Load(from + further + at[1] * kWidth);
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          MatrixMultiplyAdd<T>(sums.of[tile][i], operand, low.Element(i), high.Element(i), sums.of[tile][i]);
      }
    } while ((a += 16) < order);

    if constexpr (Shape::kTwoOrders) sums.TransformColumns(words + tiles * 16 * row_words, columns);
    sums.TransformGroups();

    const uint32_t* const last = work.signs_last ? signs : nullptr;
    if (!work.aligned) {
      Store<Shape, false, true>(sums, rows, work, first, first_a, columns, last);
    } else if (last) {
      Store<Shape, true, true>(sums, rows, work, first, first_a, columns, last);
    } else {
      Store<Shape, true, false>(sums, rows, work, first, first_a, columns, nullptr);
    }
  }
}

template <typename T>
Kernel GroupRowsKernel(int width, bool two_orders) {
  const auto make = [](auto shape) {
    Kernel kernel = {"group rows", reinterpret_cast<const void*>(&GroupRows<decltype(shape)>),
                     32 * decltype(shape)::kWarps, 0};
    kernel.words = kManyWords;
    return kernel;
  };
  if (two_orders) return width == 8 ? make(GroupShape<T, 8, 2, true>{}) : make(GroupShape<T, 4, 6, true>{});
  switch (width) {
    case 8: return make(GroupShape<T, 8, 2, false>{});
    case 4: return make(GroupShape<T, 4, 2, false>{});
    case 2: return make(GroupShape<T, 2, 2, false>{});
    default: return make(GroupShape<T, 1, 2, false>{});
  }
}

}  // namespace jax_hadacore::cuda
