// hadamard_ffi.cc: the CUDA transform as an XLA custom call.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>

#include "../arguments.h"
#include "../handlers.h"
#include "kernels.h"
#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_hadacore::cuda {
namespace {

namespace ffi = xla::ffi;

// With JAX_HADACORE_DEBUG=1, prints each plan once.
void Debug(const Problem& problem, const Buffers& buffers) {
  static const bool enabled = [] {
    const char* value = std::getenv("JAX_HADACORE_DEBUG");
    return value && std::string(value) == "1";
  }();
  if (!enabled) return;
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const std::string& line : DescribePlan(problem, buffers))
    if (printed.insert(line).second) std::fprintf(stderr, "jax_hadacore: %s\n", line.c_str());
}

// Only enqueues on the stream: no allocation, no synchronisation, the same launches for the same arguments, so XLA may
// record it into a command buffer.
ffi::Error Hadamard(cudaStream_t stream, ffi::AnyBuffer x, ffi::RemainingArgs more_operands,
                    ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets more, ffi::Dictionary attributes) {
  const ffi::ErrorOr<Problem> problem = ProblemReader(x, more_operands, attributes).ReadStrided(*y);
  if (problem.has_error()) return problem.error();
  if (problem->rows == 0) return ffi::Error::Success();
  if (!TakesStride(*problem))
    return ffi::Error::InvalidArgument(
        "jax_hadacore: a dimension with others behind it must be a power of two from " + std::to_string(kLeastStrided) +
        " to " + std::to_string(kMostStrided16) + " of 16-bit or " + std::to_string(kMostStrided32) +
        " of f32 elements, without orders or signs, got n = " + std::to_string(problem->n) + ", " +
        std::to_string(problem->factor_count) + " orders and " + (problem->signs ? "signs" : "no signs"));

  void* workspace = nullptr;
  if (NeedsWorkspace(*problem)) {
    const bool doubles = problem->dtype == Dtype::kF64;
    auto buffer = more.get<ffi::AnyBuffer>(0);
    if (buffer.has_error() || (*buffer)->element_type() != (doubles ? ffi::F64 : ffi::F32) ||
        (*buffer)->element_count() != x.element_count())
      return ffi::Error::InvalidArgument("jax_hadacore: rows of " + std::to_string(problem->n) + " elements need a " +
                                         (doubles ? "float64" : "float32") + " workspace of the operand's shape");
    workspace = (*buffer)->untyped_data();
  }
  const Buffers buffers = {x.untyped_data(), y->untyped_data(), workspace};
  Debug(*problem, buffers);
  const cudaError_t error = Enqueue(*problem, buffers, stream);
  if (error != cudaSuccess)
    return ffi::Error::Internal("jax_hadacore: rows=" + std::to_string(problem->rows) +
                                " n=" + std::to_string(problem->n) + ": " + cudaGetErrorString(error));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_hadacore::cuda

namespace jax_hadacore {
const int kFfiApiVersion[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
}  // namespace jax_hadacore

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxHadacoreHadamardCuda, jax_hadacore::cuda::Hadamard,
    jax_hadacore::BindOperands<xla::ffi::PlatformStream<cudaStream_t>>().RemainingRets().Attrs(),
    {xla::ffi::Traits::kCmdBufferCompatible});
