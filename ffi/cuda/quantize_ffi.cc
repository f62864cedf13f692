// quantize_ffi.cc: the CUDA transform whose results become codes, as an XLA custom call.
#include <cstdint>
#include <string>

#include "../handlers.h"
#include "../quantize_arguments.h"
#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_hadacore::cuda {
namespace {

namespace ffi = xla::ffi;

// As hadamard_ffi.cc: XLA may record it into a command buffer.
ffi::Error Quantize(cudaStream_t stream, ffi::AnyBuffer x, ffi::RemainingArgs more_operands,
                    ffi::Result<ffi::AnyBuffer> codes, ffi::RemainingRets more, ffi::Dictionary attributes) {
  const ffi::ErrorOr<QuantizedTransform> call = QuantizationReader(x, more_operands, attributes).Read(*codes, more);
  if (call.has_error()) return call.error();
  const auto& [problem, quantization, results] = *call;
  const auto failed = [&](const std::string& why) {
    return "jax_hadacore: codes of rows=" + std::to_string(problem.rows) + " n=" + std::to_string(problem.n) +
           " group=" + std::to_string(quantization.group) + ": " + why;
  };
  if (problem.rows == 0) return ffi::Error::Success();
  if (!FusesCodes(problem, quantization)) return ffi::Error::InvalidArgument(failed("no kernel serves"));
  if ((reinterpret_cast<uintptr_t>(x.untyped_data()) | reinterpret_cast<uintptr_t>(results.codes)) % 16)
    return ffi::Error::InvalidArgument(failed("x and codes must be aligned to 16 bytes"));
  const cudaError_t error = EnqueueCodes(problem, quantization, x.untyped_data(), results, stream);
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(failed(cudaGetErrorString(error)));
}

}  // namespace
}  // namespace jax_hadacore::cuda

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxHadacoreQuantizeCuda, jax_hadacore::cuda::Quantize,
    jax_hadacore::BindOperands<xla::ffi::PlatformStream<cudaStream_t>>().RemainingRets().Attrs(),
    {xla::ffi::Traits::kCmdBufferCompatible});
