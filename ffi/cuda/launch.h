// launch.h: enqueues the transform on a CUDA stream. Host code that needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../problem.h"

namespace jax_hadacore::cuda {

// The longest row of 16-bit elements that is transformed in one pass. A longer one needs a float32 workspace of the
// operand's shape between its two passes; float32 and float64 rows use the result for that.
constexpr int64_t kOnePass = 8192;

// Enqueues the transform of x into y and returns the launch's status. `workspace` may be null where none is needed.
cudaError_t Launch(const Problem& problem, const void* x, void* y, void* workspace, cudaStream_t stream);

// Why the kernels cannot run on this machine, or an empty string. Looks at the driver only: touches no device.
std::string DriverProblem();

// Why the kernels cannot run on the current device, or an empty string.
std::string DeviceProblem();

}  // namespace jax_hadacore::cuda
