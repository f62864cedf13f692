// order_floats.cuh: float32 rows of k * 2^m elements, k <= 192, in one pass: the order on the tensor cores, then
// butterflies.
//
// A float is the sum of three bfloat16: its upper 8 bits, the next 8, and the last 8. Their products with signs are
// exact; so are nearly always the sums of the upper ones, and those of the others are small. The whole order costs
// about one rounding, where both are added.
#pragma once

#include <type_traits>
#include <utility>

#include "fragment.cuh"
#include "kernels.h"
#include "order_stage.cuh"
#include "signs.cuh"

namespace jax_hadacore::cuda {

// A block's rows. Element (a, j) of a row, a the index of the order and j < power, is in column j; columns are counted
// on from row to row.
struct FloatRows {
  const float* x;
  float* y;
  const uint32_t *first_signs, *last_signs;  // null where there are none
  int n, order, power, bits, count, columns;
  bool aligned;

  __device__ __forceinline__ FloatRows(const Work& work, const uint32_t* words)
      : n(static_cast<int>(work.n)), order(work.order), power(work.columns), aligned(work.aligned) {
    const int64_t first = blockIdx.x * work.per_block;
    x = static_cast<const float*>(work.x) + first * n;
    y = static_cast<float*>(work.y) + first * n;
    bits = __popc(static_cast<unsigned>(power) - 1);
    count = static_cast<int>(min(work.per_block, work.count - first));
    columns = count * power;
    const uint32_t* const signs = SignsOf(work, words);
    first_signs = work.signs_last ? nullptr : signs;
    last_signs = work.signs_last ? signs : nullptr;
  }

  __device__ __forceinline__ int Element(int a, int column) const {
    return ((column >> bits) * order + a) * power + (column & (power - 1));
  }
  // An element's place in shared memory, which keeps 4 together: what lanes with different a's access at once is in
  // different banks.
  __device__ __forceinline__ int Place(int element) const { return element ^ Turn(element >> max(bits, 5)); }
  static __device__ __forceinline__ int Turn(int a) { return (a * 5 & 7) << 2; }
};

// What is left of a number without its upper 8 bits; exact.
__device__ __forceinline__ float WithoutUpper(float v) { return v - __uint_as_float(__float_as_uint(v) & 0xffff0000u); }

// The columns that a warp transforms: a lane has, of each eight of their elements, two of kWidth columns as operand B.
// kStaged: the rows are in shared memory, where sums take the place of elements.
template <int kEights, int kWidth, bool kStaged>
class FloatColumns {
 public:
  static constexpr int kColumns = 8 * kWidth;
  // There are instances enough that orders are not less.
  static constexpr int kLeastOrder = !kStaged ? 16 * ((kEights - 1) / 2) : kEights > 4 ? 4 * kEights : 0;
  // How many spans of as many columns a row's power may have.
  static constexpr int kMostSpan = Min(kMostFloatPower, kMostFloatBytes / 4 / Max(kLeastOrder, 1)) / kColumns;
  static_assert(kMostSpan < 128, "OrderFloats finishes up to 64");

  // Loads columns; with `rest` what Split() has left of them, 2^64 times as large.
  __device__ __forceinline__ void Load(const FloatRows& rows, const float* staged, int first, bool rest) {
    const int column = first + BColumn(Lane()) * kWidth, lane_a = BRow(Lane(), 0, 0);
    const int element = rows.Element(lane_a, column);
    ForEach([&](float (&v)[kWidth], int a) {
      const int at = element + a * rows.power;
      if ((kStaged && column >= rows.columns) || (a >= kLeastOrder && lane_a + a >= rows.order)) {
#pragma unroll
        for (float& zero : v) zero = 0;
      } else if constexpr (!kStaged) {
        LoadVector(v, rows.x + at);
      } else if (rows.power >= kWidth) {
        LoadVector(v, staged + rows.Place(at));
      } else {
#pragma unroll
        for (int t = 0; t < kWidth; ++t)
          v[t] = column + t < rows.columns ? staged[rows.Place(rows.Element(lane_a + a, column + t))] : 0;
      }
    });
    if (rows.first_signs) Sign(rows, column, lane_a);
    if (rest)
      ForEach([&](float (&v)[kWidth], int) {
#pragma unroll
        for (float& small : v) small = WithoutUpper(WithoutUpper(WithoutUpper(small))) * 0x1p64f;
      });
  }

  // Makes the operands. Returns whether something is left: bits below 2^-133, of small numbers, are no bfloat16's.
  __device__ __forceinline__ bool Split() {
    uint32_t last = 0;
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight)
#pragma unroll
      for (int t = 0; t < kWidth; ++t) {
        float low = v_[eight][0][t], high = v_[eight][1][t];
#pragma unroll
        for (int part = 0;; ++part) {
          operands_[eight][t][part] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
          if (part == 2) break;
          low = WithoutUpper(low), high = WithoutUpper(high);
        }
        last |= __float_as_uint(low) | __float_as_uint(high);
      }
    return last & 0xffff;
  }

  // Multiplies the columns by the matrix, whose signs are at `words`, transforms those bits of the columns that a warp
  // has, and puts the sums where the elements would be; with `rest` they are added there.
  __device__ __forceinline__ void Multiply(const FloatRows& rows, const uint32_t* words, SignsOfRows<BF16>& matrix,
                                           float* staged, int first, bool rest) const {
    const int lane = Lane(), column = first + CColumn(lane, 0) * kWidth;
    const int row_words = static_cast<int>(SignWords(rows.order));
    const int row = (column >> rows.bits) * rows.order + CRow(lane, 0), turn = FloatRows::Turn(row);
    float* to = staged + row * rows.power;
    if constexpr (kStaged) SyncWarp();  // all lanes have read what is about to be overwritten
#pragma unroll 1
    for (int a = 0; a < rows.order; a += 16) {
      float upper[kWidth][4] = {}, lower[kWidth][4] = {};
#pragma unroll
      for (int eight = 0; eight < kEights; eight += 2) {
        uint32_t signs[4];
        matrix.Next(signs, 8 * eight);
#pragma unroll
        for (int t = 0; t < kWidth; ++t)
#pragma unroll
          for (int part = 0; part < 3; ++part) {
            float (&sums)[4] = part ? lower[t] : upper[t];
            const uint32_t next = eight + 1 < kEights ? operands_[Min(eight + 1, kEights - 1)][t][part] : 0;
            MatrixMultiplyAdd<BF16>(sums, signs, operands_[eight][t][part], next, sums);
          }
      }
      // The next rows' words are on their way meanwhile; after the last, those of the next columns' first.
      const int next_a = a + 16 < rows.order ? a + 16 : 0;
      matrix = SignsOfRows<BF16>(words + next_a * row_words, row_words);
#pragma unroll
      for (int half = 0; half < 2; ++half, to += 8 * rows.power) {
        if (a + 8 * half >= rows.order) break;
        float v[2 * kWidth];
#pragma unroll
        for (int i = 0; i < 2 * kWidth; ++i) {
          const int t = i % kWidth, c = 2 * half + i / kWidth;
          v[i] = upper[t][c] + lower[t][c];
        }
        Transform(v, rows.power);
        const int lane_a = a + CRow(lane, 2 * half);
        // Where the sum of column + i is. Every eighth a is turned alike.
        const auto at = [&](int i) {
          if constexpr (kStaged) return staged + rows.Place(rows.Element(lane_a, column + i));
          return to + (((column + i) & (rows.power - 1)) ^ turn);
        };
        const int there = kStaged ? rows.columns - column : 2 * kWidth;
        if (rest) {
          SyncWarp();  // for which ptxas makes a branch of this
          if (lane_a < rows.order)
#pragma unroll
            for (int i = 0; i < 2 * kWidth; ++i)
              if (i < there) v[i] = fmaf(v[i], 0x1p-64f, *at(i));
        }
        if (lane_a >= rows.order) continue;
        if (kStaged && rows.power < kStored) {
#pragma unroll
          for (int i = 0; i < 2 * kWidth; ++i)
            if (i < there) *at(i) = v[i];
        } else {
#pragma unroll
          for (int i = 0; i < 2 * kWidth; i += kStored)
            if (i < there) StoreSome(at(i), v, i);
        }
      }
    }
  }

 private:
  static constexpr int kStored = Min(4, 2 * kWidth);  // neighbouring sums in one instruction

  // Visits elements and their a, less that of the lane's first.
  template <typename Visit>
  __device__ __forceinline__ void ForEach(const Visit& visit) {
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight)
#pragma unroll
      for (int h = 0; h < 2; ++h) visit(v_[eight][h], 8 * eight + h);
  }

  __device__ __forceinline__ void Sign(const FloatRows& rows, int column, int lane_a) {
    ForEach([&](float (&v)[kWidth], int a) {
      if (a >= kLeastOrder && lane_a + a >= rows.order) return;
      const int of_a = (lane_a + a) * rows.power;
      if (!kStaged || rows.power >= kWidth) {
        const auto signs = PackedSigns<kWidth>::From(rows.first_signs, of_a + (column & (rows.power - 1)));
#pragma unroll
        for (int t = 0; t < kWidth; ++t) v[t] = signs.Apply(v[t], t);
      } else {
#pragma unroll
        for (int t = 0; t < kWidth; ++t)
          v[t] = PackedSigns<1>::From(rows.first_signs, of_a + ((column + t) & (rows.power - 1))).Apply(v[t], 0);
      }
    });
  }

  // Butterflies of the columns that a lane has of sums, 2 kWidth, and of those of its neighbours.
  static __device__ __forceinline__ void Transform(float (&v)[2 * kWidth], int power) {
#pragma unroll
    for (int stride = 1; stride < 2 * kWidth; stride *= 2)
      if (!kStaged || stride < power)
#pragma unroll
        for (int i = 0; i < 2 * kWidth; ++i)
          if (!(i & stride)) {
            const float a = v[i], b = v[i + stride];
            v[i] = a + b, v[i + stride] = a - b;
          }
#pragma unroll
    for (int bit = 0; bit < 2; ++bit)
      if (!kStaged || 2 * kWidth << bit < power) {
        const float sign = Lane() >> bit & 1 ? -1.0f : 1.0f;
#pragma unroll
        for (float& sum : v) sum = fmaf(sign, sum, __shfl_xor_sync(kWarp, sum, 1 << bit));
      }
  }

  static __device__ __forceinline__ void StoreSome(float* to, const float (&v)[2 * kWidth], int first) {
    float some[kStored];
#pragma unroll
    for (int i = 0; i < kStored; ++i) some[i] = v[first + i];
    StoreVector(to, some);
  }

  float v_[kEights][2][kWidth];
  uint32_t operands_[kEights][kWidth][3];
};

template <int value>
using Int = std::integral_constant<int, value>;

// What is left to do where kSpan spans of kColumns columns, each of them transformed, make a row's power: the spans'
// butterflies. 1: nothing, and columns may be those of several rows.
template <int kSpan, int kColumns, bool kStaged>
__device__ __forceinline__ void FinishFloats(const FloatRows& rows, const Work& work, const float* staged) {
  constexpr int kHeld = 32, kWidth = Min(4, Max(1, kHeld / kSpan)), kOfSpan = kColumns / kWidth;
  const int elements = rows.count * rows.n;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x);; i += static_cast<int>(blockDim.x)) {
    const int element = kSpan == 1 ? i * kWidth : i / kOfSpan * rows.power + i % kOfSpan * kWidth;
    if (element >= elements) break;
    const bool whole = !kStaged || kSpan > 1 || element + kWidth <= elements;
    const int place = rows.Place(element);
    float v[kSpan][kWidth];
#pragma unroll
    for (int s = 0; s < kSpan; ++s) {
      constexpr int kTurned = 31;  // the bits that Place changes
      const float* const from = staged + (place ^ (s * kColumns & kTurned)) + (s * kColumns & ~kTurned);
      if (whole) {
        LoadVector(v[s], from);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) v[s][j] = element + j < elements ? from[j] : 0;
      }
    }
    Butterflies(v);
#pragma unroll
    for (int s = 0; s < kSpan; ++s)
#pragma unroll
      for (float& sum : v[s]) sum = fmaf(sum, work.float_scale, sum * work.scale_rest);
    if (rows.last_signs) {
      const unsigned n = static_cast<unsigned>(rows.n), at = static_cast<unsigned>(element) % n;
#pragma unroll
      for (int s = 0; s < kSpan; ++s) {
        if (!kStaged || kSpan > 1 || rows.power >= kWidth) {
          const auto signs = PackedSigns<kWidth>::From(rows.last_signs, at + s * kColumns);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) v[s][j] = signs.Apply(v[s][j], j);
        } else {
#pragma unroll
          for (int j = 0; j < kWidth; ++j)
            v[s][j] = PackedSigns<1>::From(rows.last_signs, (at + j) % n).Apply(v[s][j], 0);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSpan; ++s) {
      float* const to = rows.y + element + s * kColumns;
      if (!kStaged || (rows.aligned && whole)) {
        StoreVector(to, v[s]);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          if (whole || element + j < elements) to[j] = v[s][j];
      }
    }
  }
}

// How many columns a lane loads at once, and how many threads there are registers for.
struct FloatShape {
  int width, threads;
};
constexpr FloatShape ShapeOfFloats(int eights, bool staged) {
  if (staged) return {eights <= 4 ? 4 : eights <= 14 ? 2 : 1, eights <= 2 ? 512 : eights <= 8 ? 384 : 256};
  if (eights <= 4) return {4, 512};
  if (eights <= 8) return {2, 512};
  if (eights <= 12) return {2, 384};
  if (eights <= 18) return {2, 256};
  return {1, 384};
}

// On sm_100 and sm_120 ptxas takes a few registers more, so there only the largest blocks are asked to fit.
constexpr int ThreadsOfCode(int threads) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return MostFloatThreads(threads);
#else
  return threads;
#endif
}

// kStaged: rows come through shared memory, as they are. Otherwise they are aligned, of powers from kLeastFloatPower
// on.
template <int kEights, bool kStaged>
__global__ void __launch_bounds__(ThreadsOfCode(ShapeOfFloats(kEights, kStaged).threads), 1)
    OrderFloats(const __grid_constant__ WorkAndWords<kManyWords> given) {
  using Columns = FloatColumns<kEights, ShapeOfFloats(kEights, kStaged).width, kStaged>;
  constexpr int kColumns = Columns::kColumns;
  const Work& work = given.work;
  const uint32_t* const words = Generic(given.words);
  extern __shared__ float4 shared_memory[];
  float* const staged = reinterpret_cast<float*>(shared_memory);
  const FloatRows rows(work, given.words);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int step = threads / 32 * kColumns;
  SignsOfRows<BF16> matrix(words, static_cast<int>(SignWords(rows.order)));

  WaitForPreviousLaunch();
  if constexpr (kStaged) {
    const int elements = rows.count * rows.n, whole = rows.aligned ? elements / 4 * 4 : 0;
    for (int i = 4 * thread; i < whole; i += 4 * threads) StartCopy<0>(staged + rows.Place(i), rows.x + i);
    for (int i = whole + thread; i < elements; i += threads) staged[rows.Place(i)] = rows.x[i];
    FinishCopies();
    __syncthreads();
  }

  Columns columns;
  bool rest = false;
  int first = thread / 32 * kColumns;
  if (first < rows.columns) columns.Load(rows, staged, first, rest);
  // Of small orders a warp has many columns, and waits for each.
  if constexpr (!kStaged && kEights <= 3)
#pragma unroll 1
    for (int later = first + step; later < rows.columns; later += step)
      if (Lane() < rows.order) Prefetch(rows.x + rows.Element(Lane(), later));
#pragma unroll 1
  while (first < rows.columns) {
    const int now = first;
    const bool of_rest = rest;
    rest = __any_sync(kWarp, columns.Split()) && !rest;  // the same columns again
    if (!rest) first += step;
    if (kStaged && first < rows.columns) columns.Load(rows, staged, first, rest);
    columns.Multiply(rows, words, matrix, staged, now, of_rest);
    if (!kStaged && first < rows.columns) columns.Load(rows, staged, first, rest);
  }
  __syncthreads();

  const auto finish = [&](auto span) {
    if constexpr (span() <= Columns::kMostSpan) FinishFloats<span(), kColumns, kStaged>(rows, work, staged);
  };
  switch (rows.power / kColumns) {
    case 2: return finish(Int<2>{});
    case 4: return finish(Int<4>{});
    case 8: return finish(Int<8>{});
    case 16: return finish(Int<16>{});
    case 32: return finish(Int<32>{});
    case 64: return finish(Int<64>{});
    default: return finish(Int<1>{});
  }
}

// The kernel of as few eights as there are for the order.
template <bool kStaged, int... kEights>
Kernel FindOrderFloatsKernel(int64_t order, std::integer_sequence<int, kEights...>) {
  Kernel kernel{};
  const auto consider = [&](int eights, auto* function) {
    if (!kernel.function && order <= 8 * eights)
      kernel = {"order floats", reinterpret_cast<const void*>(function), ShapeOfFloats(eights, kStaged).threads, 0};
  };
  (consider(kEights, &OrderFloats<kEights, kStaged>), ...);
  kernel.words = kManyWords;
  return kernel;
}

template <bool kStaged>
Kernel OrderFloatsKernel(int64_t order) {
  // Few that are staged, which take long to compile and are for what is rare.
  using Eights = std::conditional_t<kStaged, std::integer_sequence<int, 4, 8, 14, 24>,
                                    std::integer_sequence<int, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24>>;
  return FindOrderFloatsKernel<kStaged>(order, Eights{});
}

}  // namespace jax_hadacore::cuda
