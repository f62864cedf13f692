// launch.cc: the plan of a transform, and its launches.
#include "launch.h"

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace jax_hadacore::cuda {
namespace {

int Log2(int64_t n) {
  int bits = 0;
  while (n > 1) n /= 2, ++bits;
  return bits;
}

bool Aligned(const void* x, const void* y) {
  return (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % 16 == 0;
}

// The launch of a kernel on rows. Where there are more than two rows for every block that runs at once, a block takes
// two and loads the second while it works on the first.
Launch OnRows(Kernel kernel, const void* x, void* y, int64_t rows, int64_t n, double scale, int processors) {
  int64_t per_block = kernel.per_block;
  if (kernel.blocks_per_processor && rows > int64_t{2} * kernel.blocks_per_processor * processors) per_block *= 2;
  return {kernel, {x, y, rows, n, 1, per_block, scale}, (rows + per_block - 1) / per_block};
}

// The launch of a kernel on the columns of (n, stride) tiles; all of a block's are in one tile.
Launch OnColumns(Kernel kernel, const void* x, void* y, int64_t tiles, int64_t n, int64_t stride, double scale) {
  const int64_t per_block = std::min(kernel.per_block, stride);
  return {kernel, {x, y, tiles * stride, n, stride, per_block, scale}, tiles * stride / per_block};
}

template <typename T>
std::vector<Launch> PlanFor(const Problem& p, const Buffers& b, int processors) {
  if (p.n <= kOnePass) {
    const Kernel kernel = RowsKernel<T, T>(Log2(p.n), Aligned(b.x, b.y));
    return {OnRows(kernel, b.x, b.y, p.rows, p.n, p.scale, processors)};
  }
  void* between = NeedsWorkspace(p) ? b.workspace : b.y;
  const int64_t parts = p.n / kOnePass;
  return {OnRows(RowsKernel<T, float>(Log2(kOnePass), Aligned(b.x, between)), b.x, between, p.rows * parts, kOnePass, 1,
                 processors),
          OnColumns(SharedKernel<float, T>(parts), between, b.y, p.rows, parts, kOnePass, p.scale)};
}

template <>
std::vector<Launch> PlanFor<double>(const Problem& p, const Buffers& b, int processors) {
  const auto kernel = SharedKernel<double, double>;
  if (p.n <= kSharedVector) return {OnRows(kernel(p.n), b.x, b.y, p.rows, p.n, p.scale, processors)};
  const int64_t parts = p.n / kSharedVector;
  return {OnRows(kernel(kSharedVector), b.x, b.y, p.rows * parts, kSharedVector, 1, processors),
          OnColumns(kernel(parts), b.y, b.y, p.rows, parts, kSharedVector, p.scale)};
}

cudaError_t CountProcessors(int& processors) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

bool NeedsWorkspace(const Problem& problem) {
  return problem.n > kOnePass && (problem.dtype == Dtype::kF16 || problem.dtype == Dtype::kBF16);
}

std::vector<Launch> Plan(const Problem& problem, const Buffers& buffers, int processors) {
  switch (problem.dtype) {
    case Dtype::kF16: return PlanFor<F16>(problem, buffers, processors);
    case Dtype::kBF16: return PlanFor<BF16>(problem, buffers, processors);
    case Dtype::kF32: return PlanFor<float>(problem, buffers, processors);
    case Dtype::kF64: return PlanFor<double>(problem, buffers, processors);
  }
  return {};
}

cudaError_t Enqueue(const Problem& problem, const Buffers& buffers, cudaStream_t stream) {
  int processors = 0;
  if (const cudaError_t error = CountProcessors(processors)) return error;
  for (Launch& launch : Plan(problem, buffers, processors)) {
    if (launch.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const Kernel& kernel = launch.kernel;
    // More than 48 KiB of shared memory has to be asked for, on each device; it is cheap, so at each launch.
    if (kernel.shared_bytes > 48 * 1024) {
      if (const cudaError_t error =
              cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes))
        return error;
    }
    void* arguments[] = {&launch.work};
    if (const cudaError_t error = cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(launch.blocks)),
                                                   dim3(static_cast<unsigned>(kernel.threads)), arguments,
                                                   static_cast<size_t>(kernel.shared_bytes), stream))
      return error;
  }
  return cudaSuccess;
}

std::vector<std::string> DescribePlan(const Problem& problem, const Buffers& buffers) {
  constexpr const char* kDtypes[] = {"float16", "bfloat16", "float32", "float64"};
  int processors = 0;
  if (CountProcessors(processors) != cudaSuccess) return {};
  std::vector<std::string> lines;
  for (const Launch& launch : Plan(problem, buffers, processors)) {
    const auto text = [](int64_t value) { return std::to_string(value); };
    lines.push_back(std::string(kDtypes[static_cast<int>(problem.dtype)]) + " n=" + text(problem.n) +
                    " rows=" + text(problem.rows) + ": " + launch.kernel.name + " of " + text(launch.work.n) + ", " +
                    text(launch.work.per_block) + " a block, " + text(launch.blocks) + " blocks of " +
                    text(launch.kernel.threads) + " threads and " + text(launch.kernel.shared_bytes) +
                    " bytes of shared memory");
  }
  return lines;
}

std::string DriverProblem() {
  int driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver))
    return std::string("the NVIDIA driver does not answer: ") + cudaGetErrorString(error);
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  if (driver == 0) return "no NVIDIA driver";
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  return "the NVIDIA driver supports CUDA " + name(driver) + ", but the kernels were built with CUDA " +
         name(CUDART_VERSION) + ": update the driver, or build from source with an older nvcc (12.8 or newer)";
}

std::string DeviceProblem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, SharedKernel<float, float>(1).function);
  if (error == cudaSuccess) return "";
  return std::string("the kernels were not built for this GPU: ") + cudaGetErrorString(error);
}

}  // namespace jax_hadacore::cuda
