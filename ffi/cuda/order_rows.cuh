// order_rows.cuh: 16-bit rows of k * 2^m elements, m >= 4, in one pass. The step of the order comes first, on the
// elements as they are, whose products with signs are exact; all that follows stays in the registers of one warp.
#pragma once

#include "order_stage.cuh"

namespace jax_hadacore::cuda {

// A row is an array of groups of 8 consecutive elements, (a, j): a is the index of the first step's matrix, which
// covers the order and the power of two's high bits, and j one of 2, 4, 8 or 16 columns. A warp computes 16 a's of
// kGroups columns, of one row or several.
constexpr int kGroups = 16;
constexpr int kGroup = 8;

// A group's place in shared memory: of its index's low three bits those that count columns are changed by higher ones,
// so that eight groups with the same j and consecutive a's are in different banks.
struct GroupPlace {
  int shift, mask;

  __device__ __forceinline__ explicit GroupPlace(int column_bits)
      : shift(max(column_bits, 3)), mask(min((1 << column_bits) - 1, 7)) {}
  __device__ __forceinline__ int operator()(int element) const {
    return element ^ (element >> (shift + 3) & mask) << 3;
  }
};

// The second step transforms a group's three bits and the columns' lowest, by a matrix whose result columns are so
// ordered that a lane gets four consecutive elements, of two products two each.
__device__ __forceinline__ constexpr int ElementOf(int product, int column) {
  return (column & 1) | product << 1 | (column >> 1 & 1) << 2 | (column >> 2) << 3;
}

// The lane's sums: of each group four, as the tensor cores hold them.
struct GroupSums {
  float of[kGroups][4] = {};

  __device__ __forceinline__ void TransformGroups() {
    uint32_t b[2][2];
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      const int column = ElementOf(product, BColumn(Lane()));
#pragma unroll
      for (int r = 0; r < 2; ++r)
        b[product][r] = 0x3f803f80 ^ static_cast<uint32_t>(__popc(BRow(Lane(), r, 0) & column) & 1) << 15 ^
                        static_cast<uint32_t>(__popc(BRow(Lane(), r, 1) & column) & 1) << 31;
    }
#pragma unroll
    for (int group = 0; group < kGroups; group += 2) {
      const float (&even)[4] = of[group], (&odd)[4] = of[group + 1];
      const HiLo a[4] = {{even[0], even[1]}, {even[2], even[3]}, {odd[0], odd[1]}, {odd[2], odd[3]}};
      const uint32_t hi[4] = {a[0].hi, a[1].hi, a[2].hi, a[3].hi}, lo[4] = {a[0].lo, a[1].lo, a[2].lo, a[3].lo};
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        float (&sums)[4] = of[group + product];
        MatrixMultiplyAdd<BF16>(sums, lo, b[product][0], b[product][1], {});
        MatrixMultiplyAdd<BF16>(sums, hi, b[product][0], b[product][1], sums);
      }
    }
  }

  // The columns' other bits.
  __device__ __forceinline__ void TransformColumns(int columns) {
#pragma unroll
    for (int h = 2; h < kGroups; h *= 2)
      if (columns > h)
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          if (!(group & h))
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float a = of[group][c], b = of[group + h][c];
              of[group][c] = a + b;
              of[group + h][c] = a - b;
            }
  }
};

template <typename T, int kWords>
__global__ void __launch_bounds__(kOrderThreads, 2) OrderRows(const __grid_constant__ WorkAndWords<kWords> given) {
  const Work& work = given.work;
  const uint32_t* const words = Generic(given.words);
  extern __shared__ float4 shared_memory[];
  uint16_t* const staged = reinterpret_cast<uint16_t*>(shared_memory);

  const BlockRows block(work);
  const uint32_t* const signs = SignsOf(work, words);
  const int order = work.order, column_bits = work.column_bits, columns = 1 << column_bits;
  const GroupPlace place(column_bits);
  // Behind the rows are the elements of a's beyond the matrix.
  uint16_t* const zeros_behind = staged + work.per_block * block.n;
  const SharedAddress zeros = AddressOf(zeros_behind);
  if (threadIdx.x == 0) *reinterpret_cast<uint4*>(zeros_behind) = make_uint4(0, 0, 0, 0);
  WaitForPreviousLaunch();
  StageRows(staged, block, work.signs_last ? nullptr : signs, work.aligned, place);

  const int lane = Lane(), row_words = static_cast<int>(SignWords(order));
  const int tiles = (order + 15) / 16, parts = ((block.rows << column_bits) + kGroups - 1) / kGroups;
  const bool plain = work.aligned && !(signs && work.signs_last);
  for (int task = static_cast<int>(threadIdx.x) / 32; task < tiles * parts; task += static_cast<int>(blockDim.x) / 32) {
    const int first_a = task % tiles * 16, first_group = task / tiles * kGroups;

    // Step 1: operand A is the matrix. Operand B are the elements of two groups, a column each of two products, which
    // come in one instruction: lanes 0 to 15 name the first's a's, lanes 16 to 31 the second's.
    SharedAddress from[kGroups / 2];
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      const int group = first_group + 2 * pair + lane / 16;
      const int row = min(group >> column_bits, block.rows - 1), j = group & (columns - 1);
      from[pair] = AddressOf(staged + place((((row * order + lane % 16) << column_bits) + j) * kGroup));
    }
    GroupSums sums;
    const uint32_t* const signs_of_a = words + first_a * row_words;
    for (int a = 0; a < order; a += 16) {
      if (a + 16 > order && a + lane % 16 >= order)
#pragma unroll
        for (SharedAddress& address : from) address = zeros;
      uint32_t operand[4];
      LoadSigns<T>(operand, signs_of_a, row_words, a);
#pragma unroll
      for (int pair = 0; pair < kGroups / 2; ++pair) {
        uint32_t b[4];
        LoadMatrices(b, from[pair]);
        from[pair] += 16 * kGroup * sizeof(uint16_t) << column_bits;
        MatrixMultiplyAdd<T>(sums.of[2 * pair], operand, b[0], b[1], sums.of[2 * pair]);
        MatrixMultiplyAdd<T>(sums.of[2 * pair + 1], operand, b[2], b[3], sums.of[2 * pair + 1]);
      }
    }

    sums.TransformGroups();
    sums.TransformColumns(columns);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int a = first_a + CRow(lane, 2 * half);
      if (a < order)
#pragma unroll
        for (int pair = 0; pair < kGroups; pair += 2) {
          const int group = first_group + pair + lane % 4 / 2, row = group >> column_bits, j = group & (columns - 1);
          const float v[4] = {sums.of[pair][2 * half], sums.of[pair][2 * half + 1], sums.of[pair + 1][2 * half],
                              sums.of[pair + 1][2 * half + 1]};
          if (row < block.rows)
            StoreResults<T>(block.y + static_cast<int64_t>(row) * block.n,
                            ((a << column_bits) + j) * kGroup + lane % 2 * 4, v, work.float_scale, plain, signs);
        }
    }
  }
}

template <typename T>
Kernel OrderRowsKernel(int words) {
  const bool few = words <= kFewWords;
  const auto function = few ? reinterpret_cast<const void*>(&OrderRows<T, kFewWords>)
                            : reinterpret_cast<const void*>(&OrderRows<T, kManyWords>);
  Kernel kernel = {"order rows", function, kOrderThreads, 0};
  kernel.words = few ? kFewWords : kManyWords;
  return kernel;
}

}  // namespace jax_hadacore::cuda
