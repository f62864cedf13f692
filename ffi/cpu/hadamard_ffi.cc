// hadamard_ffi.cc: the CPU transform as an XLA custom call. Rows are shared out over XLA's thread pool.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "../arguments.h"
#include "../handlers.h"
#include "hadamard.h"
#include "xla/ffi/api/ffi.h"

namespace jax_hadacore::cpu {
namespace {

namespace ffi = xla::ffi;

// Below this many bytes of accumulators a second thread costs more than it saves.
constexpr int64_t kBytesPerTask = 64 * 1024;

ffi::Future Ready(const ffi::Error& error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  if (error.failure()) {
    promise.SetError(error);
  } else {
    promise.SetAvailable();
  }
  return future;
}

// Rows [first, last) of the problem; false when there is no memory for the scratch.
bool TransformSlice(Problem problem, const void* x, void* y, int64_t first, int64_t last) {
  const size_t scratch_bytes = ScratchBytes(problem);
  const std::unique_ptr<char[]> scratch(scratch_bytes ? new (std::nothrow) char[scratch_bytes] : nullptr);
  if (scratch_bytes && !scratch) return false;
  const int64_t element_bytes = problem.dtype == Dtype::kF64 ? 8 : problem.dtype == Dtype::kF32 ? 4 : 2;
  const int64_t offset = first * problem.n * element_bytes;
  problem.rows = last - first;
  Transform(problem, static_cast<const char*>(x) + offset, static_cast<char*>(y) + offset, scratch.get());
  return true;
}

// A pool's thread must not wait for others, so the result is a future. Only pointers and numbers are captured: XLA
// keeps the buffers until the future is set, but not the objects that describe them.
ffi::Future Hadamard(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, double scale) {
  const ffi::ErrorOr<Problem> read = ReadProblem(x, *y, scale);
  if (read.has_error()) return Ready(read.error());
  const Problem problem = *read;
  const void* in = x.untyped_data();
  void* out = y->untyped_data();

  const int64_t bytes = problem.rows * problem.n * static_cast<int64_t>(sizeof(float));
  const int64_t tasks = std::max<int64_t>(1, std::min({pool.num_threads(), problem.rows, bytes / kBytesPerTask}));
  const auto out_of_memory = [] {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_hadacore: no memory for one row in float32");
  };
  if (tasks == 1) {
    const bool done = TransformSlice(problem, in, out, 0, problem.rows);
    return Ready(done ? ffi::Error::Success() : out_of_memory());
  }
  ffi::CountDownPromise promise(tasks);
  ffi::Future future(promise);
  for (int64_t task = tasks - 1; task >= 0; --task) {
    auto run = [=]() mutable {
      const int64_t first = problem.rows * task / tasks, last = problem.rows * (task + 1) / tasks;
      const bool done = TransformSlice(problem, in, out, first, last);
      promise.CountDown(done ? ffi::Error::Success() : out_of_memory());
    };
    if (task > 0) {
      pool.Schedule(std::move(run));
    } else {
      run();  // this thread's share
    }
  }
  return future;
}

}  // namespace

}  // namespace jax_hadacore::cpu

namespace jax_hadacore {
const int kFfiApiVersion[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
}  // namespace jax_hadacore

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxHadacoreHadamardCpu, jax_hadacore::cpu::Hadamard,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<double>("scale"));
