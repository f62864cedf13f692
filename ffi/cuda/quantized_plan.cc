// quantized_plan.cc: the launch that transforms rows and turns the results into codes.
#include "kernels.h"
#include "plan.h"

namespace jax_hadacore::cuda {
namespace {

constexpr bool IsPowerOfTwo(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

// Groups shorter than a row are found by the lanes of one warp, which hold 8 elements each. The longest rows have no
// registers for them.
constexpr int64_t MostOfGroup(int64_t n) { return n <= 1024 ? 256 : n < int64_t{1} << kMostQuantizedBits ? 128 : 0; }
constexpr int64_t kLeastOfGroup = 16;

}  // namespace

bool FusesCodes(const Problem& p, const Quantization& q) {
  return (p.dtype == Dtype::kF16 || p.dtype == Dtype::kBF16) && p.factor_count == 0 && !p.signs && IsPowerOfTwo(p.n) &&
         p.n >= int64_t{1} << kLeastQuantizedBits && p.n <= int64_t{1} << kMostQuantizedBits &&
         (q.scale == Scale::kGiven || (q.group == p.n && q.scale == Scale::kFloat32) ||
          (IsPowerOfTwo(q.group) && q.group >= kLeastOfGroup && q.group <= MostOfGroup(p.n)));
}

Launch PlanCodes(const Problem& p, const Quantization& q, const void* x, const QuantizedBuffers& results,
                 const Gpu& gpu) {
  const int bits = Log2(p.n);
  // With a scale that is given any group will do: a row.
  const int group_bits = q.scale == Scale::kGiven ? bits : Log2(q.group);
  const auto find = p.dtype == Dtype::kF16 ? QuantizedRowsKernel<F16> : QuantizedRowsKernel<BF16>;
  // A row is a group of its own, but not with the scales of 8 bits, which rows have no kernels for.
  const bool groups = group_bits < bits || q.scale == Scale::kE8M0 || q.scale == Scale::kE4M3;
  const Kernel kernel = find(bits, groups, gpu.shared_bytes);
  Launch launch = OnRows(kernel, x, results.codes, p.rows, p.n, p.scale, gpu);
  Work& work = launch.work;
  work.scales = results.scales;
  work.zero_points = results.zero_points;
  work.given = q.given;
  work.steps = q.asymmetric ? 15 : LargestCode(q.code);
  work.inverse_steps = 1 / work.steps;
  work.code = q.code;
  work.scale_type = q.scale;
  work.group_bits = group_bits;
  return launch;
}

}  // namespace jax_hadacore::cuda
