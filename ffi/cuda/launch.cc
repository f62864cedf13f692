// launch.cc: the plan of a transform, and its launches.
#include "launch.h"

#include <algorithm>
#include <atomic>
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

// Fewer elements than this a multiprocessor are few: they end soonest when spread thin.
constexpr int64_t kMany = 2048;

// How many consecutive rows a block takes. It works on one while the next is on its way, but all blocks that run at
// once wait for the last: the cost in quarters of a row, of which a block's start takes about one.
int64_t RowsPerBlock(const Kernel& kernel, int64_t rows, int processors) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t k = 1; k <= kernel.most_rows; ++k) {
    const int64_t at_once = k * kernel.blocks_per_processor * processors;
    const int64_t cost = (rows + at_once - 1) / at_once * (4 * k + 1);
    if (cost < least) best = k, least = cost;
  }
  return best;
}

Launch OnRows(const Kernel& kernel, const void* x, void* y, int64_t rows, int64_t n, double scale, const Gpu& gpu) {
  const int64_t per_block = kernel.per_block * RowsPerBlock(kernel, rows, gpu.processors);
  return {kernel, {x, y, rows, n, 1, per_block, scale}, (rows + per_block - 1) / per_block};
}

Launch OnRows(const RowsKernels& kernels, const void* x, void* y, int64_t rows, int64_t n, double scale,
              const Gpu& gpu) {
  const bool few = rows * n < kMany * gpu.processors || kernels.many.shared_bytes > gpu.shared_bytes;
  return OnRows(few ? kernels.few : kernels.many, x, y, rows, n, scale, gpu);
}

// The launch of a kernel on the columns of (n, stride) tiles; all of a block's are in one tile.
Launch OnColumns(Kernel kernel, const void* x, void* y, int64_t tiles, int64_t n, int64_t stride, double scale) {
  const int64_t per_block = std::min(kernel.per_block, stride);
  return {kernel, {x, y, tiles * stride, n, stride, per_block, scale}, tiles * stride / per_block};
}

template <typename T>
std::vector<Launch> PlanFor(const Problem& p, const Buffers& b, const Gpu& gpu) {
  if (p.n <= kOnePass) {
    return {OnRows(FindRowsKernels<T, T>(Log2(p.n), Aligned(b.x, b.y)), b.x, b.y, p.rows, p.n, p.scale, gpu)};
  }
  void* between = NeedsWorkspace(p) ? b.workspace : b.y;
  const int64_t parts = p.n / kOnePass;
  const int bits = Log2(parts);
  const Kernel columns =
      bits <= kColumnsBits && Aligned(between, b.y) ? ColumnsKernel<T>(bits) : SharedKernel<float, T>(parts);
  return {OnRows(FindRowsKernels<T, float>(Log2(kOnePass), Aligned(b.x, between)), b.x, between, p.rows * parts,
                 kOnePass, 1, gpu),
          OnColumns(columns, between, b.y, p.rows, parts, kOnePass, p.scale)};
}

template <>
std::vector<Launch> PlanFor<double>(const Problem& p, const Buffers& b, const Gpu& gpu) {
  const auto kernel = SharedKernel<double, double>;
  if (p.n <= kSharedVector) return {OnRows(kernel(p.n), b.x, b.y, p.rows, p.n, p.scale, gpu)};
  const int64_t parts = p.n / kSharedVector;
  return {OnRows(kernel(kSharedVector), b.x, b.y, p.rows * parts, kSharedVector, 1, gpu),
          OnColumns(kernel(parts), b.y, b.y, p.rows, parts, kSharedVector, p.scale)};
}

// The current device.
cudaError_t Describe(Gpu& gpu) {
  if (const cudaError_t error = cudaGetDevice(&gpu.device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&gpu.processors, cudaDevAttrMultiProcessorCount, gpu.device))
    return error;
  return cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.device);
}

// Whether kernels on a device wait for the launch before them (WaitForPreviousLaunch), so that they may begin before it
// has ended: code for sm_90 and newer does, older code that the driver compiled for such a GPU does not. All kernels
// are compiled alike, so one of them is asked, once for each device.
cudaError_t WaitsForPreviousLaunch(const void* kernel, int device, bool& waits) {
  constexpr int kDevices = 64;
  static std::atomic<int> architectures[kDevices];  // 90 for sm_90; 0 is not known yet
  int architecture = device < kDevices ? architectures[device].load() : 0;
  if (architecture == 0) {
    cudaFuncAttributes attributes{};
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    architecture = attributes.ptxVersion;
    if (device < kDevices) architectures[device] = architecture;
  }
  waits = architecture >= 90;
  return cudaSuccess;
}

}  // namespace

bool NeedsWorkspace(const Problem& problem) {
  return problem.n > kOnePass && (problem.dtype == Dtype::kF16 || problem.dtype == Dtype::kBF16);
}

std::vector<Launch> Plan(const Problem& problem, const Buffers& buffers, const Gpu& gpu) {
  switch (problem.dtype) {
    case Dtype::kF16: return PlanFor<F16>(problem, buffers, gpu);
    case Dtype::kBF16: return PlanFor<BF16>(problem, buffers, gpu);
    case Dtype::kF32: return PlanFor<float>(problem, buffers, gpu);
    case Dtype::kF64: return PlanFor<double>(problem, buffers, gpu);
  }
  return {};
}

cudaError_t Enqueue(const Problem& problem, const Buffers& buffers, cudaStream_t stream) {
  Gpu gpu{};
  if (const cudaError_t error = Describe(gpu)) return error;
  // A launch may begin while the one before it ends: every kernel waits for that itself.
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  for (Launch& launch : Plan(problem, buffers, gpu)) {
    if (launch.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const Kernel& kernel = launch.kernel;
    // More than 48 KiB of shared memory has to be asked for, on each device; it is cheap, so at each launch.
    if (kernel.shared_bytes > 48 * 1024) {
      if (const cudaError_t error =
              cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes))
        return error;
    }
    bool overlap = false;
    if (const cudaError_t error = WaitsForPreviousLaunch(kernel.function, gpu.device, overlap)) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
    config.dynamicSmemBytes = static_cast<size_t>(kernel.shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    void* arguments[] = {&launch.work};
    if (const cudaError_t error = cudaLaunchKernelExC(&config, kernel.function, arguments)) return error;
  }
  return cudaSuccess;
}

std::vector<std::string> DescribePlan(const Problem& problem, const Buffers& buffers) {
  constexpr const char* kDtypes[] = {"float16", "bfloat16", "float32", "float64"};
  Gpu gpu{};
  if (Describe(gpu) != cudaSuccess) return {};
  std::vector<std::string> lines;
  for (const Launch& launch : Plan(problem, buffers, gpu)) {
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
