// order_rows.cuh: 16-bit rows whose length is no power of two, in one pass. The step of the order comes first, on the
// elements as they are, whose products with signs are exact; all that follows stays in the registers of one warp.
#pragma once

#include "kernels.h"
#include "signs.cuh"

namespace jax_hadacore::cuda {

constexpr int kOrderThreads = 32 * kOrderWarps;

// What transforms the columns, after the first step.
enum class SecondStep {
  kButterflies,  // up to 8 of them, neighbours in a row
  kH16,          // 16 of them, neighbours in a row
  kMatrix        // the matrix of another order, whose index is the slowest of a row
};

// A row is an array of groups of kWidth consecutive elements, (a, j): a is the index of the first step's matrix, which
// covers the order and the power of two's high bits, and j the column. Groups with the same a are neighbours, or, for
// kMatrix, those with the same j. A warp computes 16 a's of 8 kTiles columns, of one row or several.
template <typename T_, int kWidth_, SecondStep kStep_, int kTiles_>
struct OrderShape {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr SecondStep kStep = kStep_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kColumns = 8 * kTiles;  // of a warp
  static constexpr bool kMatrix = kStep == SecondStep::kMatrix;
  static constexpr int kBlocksPerProcessor = kMatrix ? 1 : 2;
  static_assert(kWidth == 8 || kMatrix || kStep == SecondStep::kButterflies);
};

// The groups (a, j) and (a + 1, j), as they come.
template <int kWidth>
struct GroupPair {
  uint32_t words[kWidth] = {};

  // Element i of both, packed.
  __device__ __forceinline__ uint32_t Element(int i) const {
    if constexpr (kWidth == 1) return words[0];
    return __byte_perm(words[i / 2], words[kWidth / 2 + i / 2], i % 2 ? 0x7632 : 0x5410);
  }

  // Short groups are neighbours.
  __device__ __forceinline__ void Load(const uint16_t* even, const uint16_t* odd) {
    if constexpr (kWidth == 8) {
      Set<0>(*reinterpret_cast<const uint4*>(even));
      Set<4>(*reinterpret_cast<const uint4*>(odd));
    } else if constexpr (kWidth == 4) {
      Set<0>(*reinterpret_cast<const uint4*>(even));
    } else if constexpr (kWidth == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(even);
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(even);
    }
  }

 private:
  template <int kFirst>
  __device__ __forceinline__ void Set(uint4 v) {
    words[kFirst] = v.x, words[kFirst + 1] = v.y, words[kFirst + 2] = v.z, words[kFirst + 3] = v.w;
  }
};

// The lane's operand B of the second step's matrix: 16 rows from 16 `step` on, 8 columns from 8 `tile` on.
template <typename Shape>
class ColumnMatrix {
 public:
  static constexpr int kWords = (Shape::kColumns + 31) / 32;  // of a column

  __device__ __forceinline__ explicit ColumnMatrix(const uint32_t* words) {
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      const int column = 8 * tile + BColumn(Lane());
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        if constexpr (Shape::kMatrix) {
          words_[tile][word] = words[column * kWords + word];
        } else {
          uint32_t signs = 0;
#pragma unroll
          for (int i = 0; i < 8; ++i)
            signs |= (__popc(2 * i & column) & 1) << i | (__popc((2 * i + 1) & column) & 1) << (16 + i);
          words_[tile][word] = signs;
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t Operand(int tile, int step, int r) const {
    return SignedOnes<BF16>(words_[tile][step / 2], 8 * (step % 2) + BRow(Lane(), r, 0) / 2);
  }

 private:
  uint32_t words_[Shape::kTiles][kWords];
};

// The lane's sums: of `tile` and element `i` of a group four, as the tensor cores hold them.
template <typename Shape>
struct OrderSums {
  float of[Shape::kTiles][Shape::kWidth][4] = {};

  // Transforms the columns by a matrix. A sum becomes two bfloat16, as between the steps of a fragment.
  __device__ __forceinline__ void TransformColumns(const ColumnMatrix<Shape>& matrix) {
    constexpr int kTiles = Shape::kTiles;
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) {
      uint32_t hi[2 * kTiles], lo[2 * kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float a = of[tile][i][2 * half], b = of[tile][i][2 * half + 1];
          const uint32_t packed = Pack<BF16>(a, b);
          hi[2 * tile + half] = packed;
          lo[2 * tile + half] =
              Pack<BF16>(a - __uint_as_float(packed << 16), b - __uint_as_float(packed & 0xffff0000u));
        }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float sums[4] = {};
#pragma unroll
        for (int step = 0; step < kTiles / 2; ++step) {
          const uint32_t b0 = matrix.Operand(tile, step, 0), b1 = matrix.Operand(tile, step, 1);
          const uint32_t low[4] = {lo[4 * step], lo[4 * step + 1], lo[4 * step + 2], lo[4 * step + 3]};
          const uint32_t high[4] = {hi[4 * step], hi[4 * step + 1], hi[4 * step + 2], hi[4 * step + 3]};
          MatrixMultiplyAdd<BF16>(sums, low, b0, b1, sums);
          MatrixMultiplyAdd<BF16>(sums, high, b0, b1, sums);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) of[tile][i][c] = sums[c];
      }
    }
  }

  // Transforms up to 8 columns: those of a lane, and of two or four neighbouring ones.
  __device__ __forceinline__ void TransformColumns(int columns) {
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) {
        float (&v)[4] = of[tile][i];
        if (columns >= 2) {
          const float a = v[0], b = v[2];
          v[0] = a + v[1], v[1] = a - v[1];
          v[2] = b + v[3], v[3] = b - v[3];
        }
#pragma unroll
        for (int bit = 0; bit < 2; ++bit)
          if (columns >= 4 << bit) {
            const float sign = Lane() >> bit & 1 ? -1.0f : 1.0f;
#pragma unroll
            for (int c = 0; c < 4; ++c) v[c] = fmaf(sign, v[c], __shfl_xor_sync(kWarp, v[c], 1 << bit));
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

// Where an element of a block's rows is kept in shared memory: of the index of its 16 bytes, the two bits that tell
// apart the a's that neighbouring lanes read are folded into bits 1 and 2, so that these use all banks.
__device__ __forceinline__ int OrderSwizzle(int element, int swizzle) {
  return element ^ (element >> (swizzle + 3) & 3) << 4;
}

// A group's sums (c is fixed), scaled and rounded.
template <typename Shape>
__device__ __forceinline__ void StoreGroup(uint16_t* to, const float (&v)[Shape::kWidth][4], int c, float scale,
                                           const uint32_t* signs, int at, bool aligned) {
  using T = typename Shape::T;
  constexpr int kWidth = Shape::kWidth;
  if constexpr (kWidth == 1) {
    uint32_t packed = Pack<T>(v[0][c] * scale, 0);
    if (signs) packed ^= SignBit(signs, at) << 15;
    *to = static_cast<uint16_t>(packed);
  } else {
    uint32_t packed[kWidth / 2];
#pragma unroll
    for (int pair = 0; pair < kWidth / 2; ++pair) {
      packed[pair] = Pack<T>(v[2 * pair][c] * scale, v[2 * pair + 1][c] * scale);
      if (signs) packed[pair] ^= PairSigns(signs[at / 32], at % 32 / 2 + pair);
    }
    if (!aligned) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) to[i] = static_cast<uint16_t>(packed[i / 2] >> 16 * (i % 2));
    } else if constexpr (kWidth == 8) {
      *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    } else if constexpr (kWidth == 4) {
      *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = packed[0];
    }
  }
}

template <typename Shape, int kWords>
__global__ void __launch_bounds__(kOrderThreads, Shape::kBlocksPerProcessor)
    OrderRows(const __grid_constant__ WorkAndWords<kWords> given) {
  using T = typename Shape::T;
  constexpr int kWidth = Shape::kWidth, kTiles = Shape::kTiles;
  const Work& work = given.work;
  const uint32_t* const words = Generic(given.words);
  extern __shared__ float4 shared_memory[];
  uint16_t* const staged = reinterpret_cast<uint16_t*>(shared_memory);

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = Lane();
  const int n = static_cast<int>(work.n), order = work.order, columns = work.columns;
  const int64_t first = blockIdx.x * work.per_block;
  const int rows = static_cast<int>(min(work.per_block, work.count - first)), elements = rows * n;
  const uint16_t* const x = static_cast<const uint16_t*>(work.x) + first * n;
  uint16_t* const y = static_cast<uint16_t*>(work.y) + first * n;
  const int row_of_a = Shape::kMatrix ? kWidth : columns * kWidth;  // elements between a and a + 1
  const int row_of_j = Shape::kMatrix ? order * kWidth : kWidth;    // and between j and j + 1
  const int order_words = static_cast<int>(SignWords(order));
  const uint32_t* signs = nullptr;
  if (work.words_before_signs >= 0) signs = work.device_signs ? work.device_signs : words + work.words_before_signs;

  // The block's rows, signed where that comes first: every thread signs what it has copied itself.
  WaitForPreviousLaunch();
  const int whole = work.aligned ? elements / 8 : 0;
  for (int i = thread; i < whole; i += threads) StartCopy<0>(staged + OrderSwizzle(8 * i, work.swizzle), x + 8 * i);
  for (int i = 8 * whole + thread; i < elements; i += threads) staged[OrderSwizzle(i, work.swizzle)] = x[i];
  FinishCopies();
  if (signs && !work.signs_last) {
    for (int i = thread; i < whole; i += threads) {
      uint32_t* const to = reinterpret_cast<uint32_t*>(staged + OrderSwizzle(8 * i, work.swizzle));
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int at = (8 * i + 2 * pair) % n;
        to[pair] ^= PairSigns(signs[at / 32], at % 32 / 2);
      }
    }
    for (int i = 8 * whole + thread; i < elements; i += threads) {
      staged[OrderSwizzle(i, work.swizzle)] ^= static_cast<uint16_t>(SignBit(signs, i % n) << 15);
    }
  }
  __syncthreads();

  const ColumnMatrix<Shape> matrix(words + (order + 15) / 16 * 16 * order_words);
  const int tiles_of_a = (order + 15) / 16;
  const int parts = Shape::kMatrix ? rows : (rows * columns + Shape::kColumns - 1) / Shape::kColumns;
  for (int task = thread / 32; task < tiles_of_a * parts; task += threads / 32) {
    const int first_a = task % tiles_of_a * 16, part = task / tiles_of_a;
    // Column `at` of the warp's, as a row of the block and a column of it.
    const auto row_of = [&](int at) { return Shape::kMatrix ? part : (part * Shape::kColumns + at) / columns; };
    const auto column_of = [&](int at) { return Shape::kMatrix ? at : (part * Shape::kColumns + at) % columns; };

    // Step 1: operand A is the matrix, operand B the elements, of which a lane loads whole groups.
    const uint16_t *even[kTiles], *odd[kTiles];
    bool inside[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int at = 8 * tile + BColumn(lane), j = column_of(at);
      inside[tile] = !Shape::kMatrix || j < columns;
      const int element = min(row_of(at), rows - 1) * n + BRow(lane, 0, 0) * row_of_a + j * row_of_j;
      even[tile] = staged + OrderSwizzle(element, work.swizzle);
      odd[tile] = staged + OrderSwizzle(element + row_of_a, work.swizzle);
    }
    OrderSums<Shape> sums;
    const uint32_t* signs_of_a = words + (first_a + ARow(lane, 0)) * order_words;
#pragma unroll 2
    for (int a = 0; a < order; a += 16) {
      const uint32_t upper = signs_of_a[a / 32], lower = signs_of_a[8 * order_words + a / 32];
      const int pair = a % 32 / 2 + AColumn(lane, 0, 0) / 2;
      const uint32_t operand[4] = {SignedOnes<T>(upper, pair), SignedOnes<T>(lower, pair),
                                   SignedOnes<T>(upper, pair + 4), SignedOnes<T>(lower, pair + 4)};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        GroupPair<kWidth> low, high;  // zeros beyond the order
        if (inside[tile] && a + BRow(lane, 0, 0) < order) low.Load(even[tile] + a * row_of_a, odd[tile] + a * row_of_a);
        if (inside[tile] && a + BRow(lane, 1, 0) < order)
          high.Load(even[tile] + (a + 8) * row_of_a, odd[tile] + (a + 8) * row_of_a);
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          MatrixMultiplyAdd<T>(sums.of[tile][i], operand, low.Element(i), high.Element(i), sums.of[tile][i]);
      }
    }

    if constexpr (Shape::kStep == SecondStep::kButterflies) {
      sums.TransformColumns(columns);
    } else {
      sums.TransformColumns(matrix);
    }
    sums.TransformGroups();

#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int a = first_a + CRow(lane, c);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int at = 8 * tile + CColumn(lane, c), row = row_of(at), j = column_of(at);
        if (a < order && row < rows && j < columns) {
          const int position = a * row_of_a + j * row_of_j;
          StoreGroup<Shape>(y + static_cast<int64_t>(row) * n + position, sums.of[tile], c, work.float_scale,
                            work.signs_last ? signs : nullptr, position, work.aligned);
        }
      }
    }
  }
}

template <typename Shape, int kWords>
Kernel MakeOrderRowsKernel() {
  Kernel kernel = {"order rows", reinterpret_cast<const void*>(&OrderRows<Shape, kWords>), kOrderThreads, 0};
  kernel.words = kWords;
  return kernel;
}

template <typename T>
Kernel OrderRowsKernel(int width, int columns, bool matrix, int words) {
  constexpr auto kButterflies = SecondStep::kButterflies, kH16 = SecondStep::kH16, kMatrix = SecondStep::kMatrix;
  const bool few = words <= kFewWords;
  if (matrix && width == 8) return MakeOrderRowsKernel<OrderShape<T, 8, kMatrix, 2>, kManyWords>();
  if (matrix) return MakeOrderRowsKernel<OrderShape<T, 4, kMatrix, 6>, kManyWords>();
  if (columns == 16 && few) return MakeOrderRowsKernel<OrderShape<T, 8, kH16, 2>, kFewWords>();
  if (columns == 16) return MakeOrderRowsKernel<OrderShape<T, 8, kH16, 2>, kManyWords>();
  switch (width) {
    case 8:
      return few ? MakeOrderRowsKernel<OrderShape<T, 8, kButterflies, 2>, kFewWords>()
                 : MakeOrderRowsKernel<OrderShape<T, 8, kButterflies, 2>, kManyWords>();
    case 4: return MakeOrderRowsKernel<OrderShape<T, 4, kButterflies, 2>, kManyWords>();
    case 2: return MakeOrderRowsKernel<OrderShape<T, 2, kButterflies, 2>, kManyWords>();
    default: return MakeOrderRowsKernel<OrderShape<T, 1, kButterflies, 2>, kManyWords>();
  }
}

}  // namespace jax_hadacore::cuda
