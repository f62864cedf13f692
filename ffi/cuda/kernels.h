// kernels.h: the kernels that the instances provide, looked up by the host.
#pragma once

#include "order_ring.h"
#include "work.h"

namespace jax_hadacore::cuda {

struct F16;
struct BF16;

// The kernels for rows of 2^bits <= 2^15 elements of one type, with float32 results of 2^15 16-bit elements besides;
// for rows of 2^16 16-bit elements there is `split` alone. `aligned`: the buffers are aligned to 16 bytes.
struct RowsKernels {
  Kernel many;             // for many rows
  Kernel few;              // for few; it fits into any GPU's shared memory
  Kernel split;            // for so few that two blocks to a row end sooner; none where its threads are 0
  int64_t split_elements;  // a multiprocessor, up to which it is used
  // Those that apply signs as well, to aligned rows however many they are:
  Kernel signed_rows;           // where it fits into the shared memory
  Kernel signed_rows_anywhere;  // elsewhere
};
template <typename In, typename Out>
RowsKernels FindRowsKernels(int bits, bool aligned);

extern template RowsKernels FindRowsKernels<F16, F16>(int, bool);
extern template RowsKernels FindRowsKernels<F16, float>(int, bool);
extern template RowsKernels FindRowsKernels<BF16, BF16>(int, bool);
extern template RowsKernels FindRowsKernels<BF16, float>(int, bool);
extern template RowsKernels FindRowsKernels<float, float>(int, bool);

// Aligned 16-bit rows of 2^bits elements, 5 to 15 bits, whose results become codes (quantized_rows.cuh), with a scale
// to each row or, of less than 15 bits, to each group of one; for a GPU that gives a block so many bytes of shared
// memory.
constexpr int kLeastQuantizedBits = 5, kMostQuantizedBits = 15;
template <typename T>
Kernel QuantizedRowsKernel(int bits, Formats formats, int64_t shared_bytes);

extern template Kernel QuantizedRowsKernel<F16>(int, Formats, int64_t);
extern template Kernel QuantizedRowsKernel<BF16>(int, Formats, int64_t);

// Such rows of k * 2^m elements, in kQuantizedColumns columns of groups of 8, and up to kMostQuantizedOrder a's
// (quantized_orders.cuh); a block has a warp for each 16 of them. Beside its rows it needs kQuantizedExtra bytes of
// shared memory.
constexpr int kQuantizedColumns = 16, kMostQuantizedOrder = 256, kQuantizedExtra = 384;
constexpr int kQuantizedWords = kMostQuantizedOrder * kMostQuantizedOrder / 32 + 16;  // one beyond the matrix is read
template <typename T>
Kernel QuantizedOrdersKernel(Formats formats);

extern template Kernel QuantizedOrdersKernel<F16>(Formats);
extern template Kernel QuantizedOrdersKernel<BF16>(Formats);

// Columns of 2^bits <= 2^kColumnsBits float32 numbers, in registers, of which a thread has ColumnsWidth beside each
// other, in one tile. Buffers are aligned to 16 bytes.
constexpr int kColumnsBits = 7;
constexpr int ColumnsWidth(int bits) { return bits <= 3 ? 4 : bits <= 5 ? 2 : 1; }
template <typename Out>
Kernel ColumnsKernel(int bits);

extern template Kernel ColumnsKernel<F16>(int);
extern template Kernel ColumnsKernel<BF16>(int);
extern template Kernel ColumnsKernel<float>(int);

// Columns of 2^bits 16-bit elements, by pieces that are so many columns wide (strided_rows.cuh); a block has `pieces`.
struct StridedKernel {
  Kernel kernel;
  int columns, pieces;
};
template <typename T>
StridedKernel FindStridedKernel(int bits);

extern template StridedKernel FindStridedKernel<F16>(int);
extern template StridedKernel FindStridedKernel<BF16>(int);

// The lengths of columns that a problem may have; float32 ones longer than this would not fit into registers.
constexpr int64_t kLeastStrided = 8, kMostStrided16 = 256, kMostStrided32 = 1 << kColumnsBits;

// Vectors of any stride, up to kSharedVector elements, by butterflies in shared memory: rows of doubles, and columns.
constexpr int64_t kSharedVector = 8192;
template <typename A, typename Out>
Kernel SharedKernel(int64_t n);

extern template Kernel SharedKernel<float, F16>(int64_t);
extern template Kernel SharedKernel<float, BF16>(int64_t);
extern template Kernel SharedKernel<float, float>(int64_t);
extern template Kernel SharedKernel<double, double>(int64_t);

// Rows of 16-bit elements whose length is no power of two, in one pass. A kernel's threads are the most that a block
// may have, two of which have registers at once.

// Of groups of 8 elements in 2^column_bits columns, 2 to kMostColumns (order_rows.cuh).
constexpr int kMostColumns = 32;
template <typename T>
Kernel OrderRowsKernel(int column_bits, int words);

extern template Kernel OrderRowsKernel<F16>(int, int);
extern template Kernel OrderRowsKernel<BF16>(int, int);

// The same for groups of warps (order_ring.cuh), in 4 to kMostRingColumns columns.
constexpr int kMostRingColumns = 16;
template <typename T>
Kernel OrderRingKernel(const RingLayout& ring);

extern template Kernel OrderRingKernel<F16>(const RingLayout&);
extern template Kernel OrderRingKernel<BF16>(const RingLayout&);

// The same for rows that become codes, with kMostRingColumns columns and as many groups together as here; the matrix
// has room as elements.
constexpr int kTogetherForCodes = 8;
template <typename T>
Kernel QuantizedRingKernel(Formats formats);

extern template Kernel QuantizedRingKernel<F16>(Formats);
extern template Kernel QuantizedRingKernel<BF16>(Formats);

// Of groups of up to 8 elements; with two orders of groups of 8 or 4, one order up to MostColumns (group_rows.cuh).
constexpr int MostColumns(int width) { return width == 8 ? 16 : 48; }
template <typename T>
Kernel GroupRowsKernel(int width, bool two_orders);

extern template Kernel GroupRowsKernel<F16>(int, bool);
extern template Kernel GroupRowsKernel<BF16>(int, bool);

// Of two orders for groups of warps (pair_ring.cuh), for groups of 4 elements and 8 * `eights` columns, 5 or 6, or of 8
// elements, two side by side, and 3.
template <typename T>
Kernel PairRingKernel(int width, int eights);

extern template Kernel PairRingKernel<F16>(int, int);
extern template Kernel PairRingKernel<BF16>(int, int);

// Of float32 rows of k * 2^m elements (order_floats.cuh); `threads` are those that a multiprocessor has registers for,
// and MostFloatThreads of them a block's at most. kStaged: rows come through shared memory, as they have to where
// powers are less than kLeastFloatPower, or rows are not aligned. A row has at most kMostFloatBytes.
constexpr int kMostFloatOrder = 192, kLeastFloatPower = 32, kMostFloatPower = 2048, kMostFloatBytes = 227 * 1024;
constexpr int MostFloatThreads(int of_processor) { return of_processor > 256 ? of_processor - 128 : of_processor; }
template <bool kStaged>
Kernel OrderFloatsKernel(int64_t order);

extern template Kernel OrderFloatsKernel<false>(int64_t);
extern template Kernel OrderFloatsKernel<true>(int64_t);

// Factors and signs by themselves, for what is left (factor.cuh).
template <typename In, typename A>
Kernel FactorKernel(int64_t order, bool values);
template <typename T>
Kernel SignsKernel();

extern template Kernel FactorKernel<F16, float>(int64_t, bool);
extern template Kernel FactorKernel<BF16, float>(int64_t, bool);
extern template Kernel FactorKernel<float, float>(int64_t, bool);
extern template Kernel FactorKernel<double, double>(int64_t, bool);
extern template Kernel SignsKernel<uint16_t>();
extern template Kernel SignsKernel<float>();
extern template Kernel SignsKernel<double>();

}  // namespace jax_hadacore::cuda
