// hadamard_ffi.cc: the CPU transform as an XLA custom call, alone or with quantisation. Rows are shared out over XLA's
// thread pool.
#include <cstdint>
#include <memory>
#include <new>

#include "../arguments.h"
#include "../handlers.h"
#include "../quantize_arguments.h"
#include "call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_hadacore::cpu {
namespace {

namespace ffi = xla::ffi;

template <typename... Arguments>
ffi::Error Run(ffi::ThreadPool& pool, const Problem& problem, const Arguments&... arguments) try {
  const int64_t threads = ThreadsWorth(problem, pool.num_threads());
  if (threads == 1) {
    Call(problem, arguments..., 1).Work(0);
    return ffi::Error::Success();
  }
  // Shared with the pool's threads, some of which may come when all is done and this function has returned.
  const auto call = std::make_shared<Call>(problem, arguments..., threads);
  for (int64_t thread = 1; thread < threads; ++thread) pool.Schedule([call, thread] { call->Work(thread); });
  call->Work(0);
  call->Wait();
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_hadacore: no memory for rows in float32");
}

ffi::Error Hadamard(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> y,
                    ffi::Dictionary attributes) {
  const ffi::ErrorOr<Problem> problem = ProblemReader(x, more, attributes).Read(*y);
  if (problem.has_error()) return problem.error();
  return Run(pool, *problem, x.untyped_data(), y->untyped_data());
}

ffi::Error Quantize(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> codes,
                    ffi::RemainingRets per_group, ffi::Dictionary attributes) {
  const ffi::ErrorOr<QuantizedTransform> call = QuantizationReader(x, more, attributes).Read(*codes, per_group);
  if (call.has_error()) return call.error();
  return Run(pool, call->problem, call->quantization, x.untyped_data(), call->results);
}

}  // namespace

}  // namespace jax_hadacore::cpu

namespace jax_hadacore {
const int kFfiApiVersion[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
}  // namespace jax_hadacore

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxHadacoreHadamardCpu, jax_hadacore::cpu::Hadamard,
                              jax_hadacore::BindOperands<xla::ffi::ThreadPool>().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxHadacoreQuantizeCpu, jax_hadacore::cpu::Quantize,
                              jax_hadacore::BindOperands<xla::ffi::ThreadPool>().RemainingRets().Attrs());
