// quantized_plan.cc: the launch that transforms rows and turns the results into codes.
#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "order_words.h"
#include "plan.h"

namespace jax_hadacore::cuda {
namespace {

constexpr bool IsPowerOfTwo(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

// Groups shorter than a row are found by the lanes of one warp, which hold 8 elements of a row each. The longest rows
// have no registers for them.
constexpr int64_t MostOfGroup(int64_t n) { return n <= 1024 ? 256 : n < int64_t{1} << kMostQuantizedBits ? 128 : 0; }
constexpr int64_t kLeastOfGroup = 16;

constexpr int64_t kOfColumns = 8 * kQuantizedColumns;  // elements

// Rows of k * 2^m elements that there are kernels for.
bool IsOfOrder(const Problem& p) {
  return p.factor_count == 1 && !p.factors[0].values && p.factors[0].order % 2 == 0 &&
         PowerOfTwo(p) % kOfColumns == 0 && p.n <= kOfColumns * kMostQuantizedOrder;
}

bool IsOfPower(const Problem& p) {
  return p.factor_count == 0 && p.n >= int64_t{1} << kLeastQuantizedBits && p.n <= int64_t{1} << kMostQuantizedBits;
}

// Else a block to a row at a time, and as many blocks as multiprocessors have registers for.
Launch OrdersToCodes(const Problem& p, Formats formats, const void* x, void* codes, const Gpu& gpu) {
  if (const auto launch = CodesOnRing(p, formats, x, codes, gpu)) return *launch;
  const int64_t order = p.n / kOfColumns, warps = DivideUp(order, 16), most_warps = kMostQuantizedOrder / 16;
  int64_t blocks = most_warps / warps, buffers = 2;
  const auto bytes = [&] { return 2 * p.n * buffers + kQuantizedExtra; };
  const auto fits = [&] { return blocks * (bytes() + kReserved) <= gpu.shared_bytes + kReserved; };
  if (!fits()) buffers = 1;
  while (!fits()) --blocks;
  Launch launch = {p.dtype == Dtype::kF16 ? QuantizedOrdersKernel<F16>(formats) : QuantizedOrdersKernel<BF16>(formats),
                   MakeWork(x, codes, p.rows, p.n, 1, 1, p.scale), std::min(p.rows, blocks * gpu.processors),
                   *FirstStepWords(p.factors[0], order / p.factors[0].order)};
  launch.kernel.threads = static_cast<int>(32 * warps);
  launch.kernel.shared_bytes = static_cast<int>(bytes());
  launch.work.order = static_cast<int>(order);
  launch.work.columns = kQuantizedColumns;
  launch.work.ring = static_cast<int>(buffers);
  launch.work.runs = launch.blocks;
  return launch;
}

Launch PowersToCodes(const Problem& p, Formats formats, const void* x, void* codes, const Gpu& gpu) {
  const auto find = p.dtype == Dtype::kF16 ? QuantizedRowsKernel<F16> : QuantizedRowsKernel<BF16>;
  return OnRows(find(Log2(p.n), formats, gpu.shared_bytes), x, codes, p.rows, p.n, p.scale, gpu);
}

}  // namespace

bool FusesCodes(const Problem& p, const Quantization& q) {
  const int64_t most = p.factor_count == 0 ? MostOfGroup(p.n) : kOfColumns;
  // Codes of float8_e5m2 tell numbers apart that are 2^-32 of the largest: the sums between an order and a power of two
  // have 16 bits.
  return Is16Bit(p) && !p.signs && (IsOfPower(p) || (IsOfOrder(p) && q.code != Code::kFloat8E5M2)) &&
         (q.scale == Scale::kGiven || (q.group == p.n && q.scale == Scale::kFloat32) ||
          (IsPowerOfTwo(q.group) && q.group >= kLeastOfGroup && q.group <= most));
}

Launch PlanCodes(const Problem& p, const Quantization& q, const void* x, const QuantizedBuffers& results,
                 const Gpu& gpu) {
  // A row is a group of its own, but not with the scales of 8 bits, which rows have no kernels for; with a scale that
  // is given any group will do: a row.
  const bool groups = q.scale != Scale::kGiven && (q.group < p.n || q.scale != Scale::kFloat32);
  const Formats formats = !groups                       ? Formats::kOfRows
                          : q.code == Code::kFloat4E2M1 ? Formats::kFloat4
                                                        : Formats::kOfGroups;
  Launch launch = (p.factor_count == 0 ? PowersToCodes : OrdersToCodes)(p, formats, x, results.codes, gpu);
  Work& work = launch.work;
  work.scales = results.scales;
  work.zero_points = results.zero_points;
  work.given = q.given;
  work.steps = q.asymmetric ? 15 : LargestCode(q.code);
  work.inverse_steps = 1 / work.steps;
  work.code = q.code;
  work.scale_type = q.scale;
  work.group_bits = groups ? Log2(q.group) : 0;
  return launch;
}

}  // namespace jax_hadacore::cuda
