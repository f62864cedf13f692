// hadamard_ffi.cc: the CUDA transform as an XLA custom call.
#include <cstdint>
#include <string>

#include "../arguments.h"
#include "../handlers.h"
#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_hadacore::cuda {
namespace {

namespace ffi = xla::ffi;

bool NeedsWorkspace(const Problem& problem) {
  return problem.n > kOnePass && (problem.dtype == Dtype::kF16 || problem.dtype == Dtype::kBF16);
}

// Only enqueues on the stream: no allocation, no synchronisation, the same launches for the same arguments, so XLA may
// record it into a command buffer.
ffi::Error Hadamard(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets more,
                    double scale) {
  const ffi::ErrorOr<Problem> problem = ReadProblem(x, *y, scale);
  if (problem.has_error()) return problem.error();
  if (problem->rows == 0) return ffi::Error::Success();

  void* workspace = nullptr;
  if (NeedsWorkspace(*problem)) {
    auto buffer = more.get<ffi::AnyBuffer>(0);
    if (buffer.has_error() || (*buffer)->element_type() != ffi::F32 || (*buffer)->element_count() != x.element_count())
      return ffi::Error::InvalidArgument("jax_hadacore: 16-bit rows of " + std::to_string(problem->n) +
                                         " elements need a float32 workspace of the operand's shape");
    workspace = (*buffer)->untyped_data();
  }
  const cudaError_t error = Launch(*problem, x.untyped_data(), y->untyped_data(), workspace, stream);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxHadacoreHadamardCuda, jax_hadacore::cuda::Hadamard,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<double>("scale"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
