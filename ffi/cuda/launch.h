// launch.h: chooses and enqueues the kernels of a transform. Host code that needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "../problem.h"
#include "../quantization.h"
#include "work.h"

namespace jax_hadacore::cuda {

// The longest row of 16-bit or float32 elements, of a power of two, that is transformed in one pass. A longer one of
// 16-bit elements needs a float32 workspace between its two passes; float32 and float64 rows use the result for that.
constexpr int64_t kOnePass = 32768;
// Where blocks can meet, 16-bit rows of this length take one pass as well, and leave the workspace alone.
constexpr int64_t kOnePassSplit = 65536;

// The least shared memory that a block may have on the architectures that the kernels are for: on sm_86, 89 and 120.
constexpr int64_t kLeastShared = 99 * 1024;

// Whether a transform needs a workspace of the operand's shape, of float32 or, for float64, of that: decided by the
// problem alone, when a program is lowered.
bool NeedsWorkspace(const Problem& problem);

// Whether there are kernels for a problem's stride: for any in a range of lengths, without orders or signs.
bool TakesStride(const Problem& problem);

struct Buffers {
  const void* x;
  void* y;
  void* workspace;  // null where none is needed
};

// What a plan depends on.
struct Gpu {
  int device;
  int processors;
  int shared_bytes;  // the most that a block may have
  bool overlap;      // kernels wait for the launch before them, so they may begin before it has ended
  bool clusters;     // neighbouring blocks can meet
  bool warp_groups;  // and groups of four warps multiply
};

// One kernel launch.
struct Launch {
  Kernel kernel;
  Work work;
  int64_t blocks;
  std::vector<uint32_t> words;  // of a kernel that takes some
};

// The launches that transform a problem.
std::vector<Launch> Plan(const Problem& problem, const Buffers& buffers, const Gpu& gpu);

// Enqueues the transform on the current device's stream and returns the launches' status.
cudaError_t Enqueue(const Problem& problem, const Buffers& buffers, cudaStream_t stream);

// Whether one launch transforms rows of 16-bit elements and turns the results into codes.
bool FusesCodes(const Problem& problem, const Quantization& quantization);

// That launch, for x and codes that are aligned to 16 bytes.
Launch PlanCodes(const Problem& problem, const Quantization& quantization, const void* x,
                 const QuantizedBuffers& results, const Gpu& gpu);
cudaError_t EnqueueCodes(const Problem& problem, const Quantization& quantization, const void* x,
                         const QuantizedBuffers& results, cudaStream_t stream);

// The plan on the current device for people, one line a launch.
std::vector<std::string> DescribePlan(const Problem& problem, const Buffers& buffers);

// Why the kernels cannot run on this machine, or an empty string. Looks at the driver only: touches no device.
std::string DriverProblem();

// Why the kernels cannot run on the current device, or an empty string.
std::string DeviceProblem();

}  // namespace jax_hadacore::cuda
