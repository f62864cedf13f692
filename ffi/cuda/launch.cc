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
int64_t RowsPerBlock(const Kernel& kernel, int64_t rows, int64_t at_once) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t k = 1; k <= kernel.most_rows; ++k) {
    const int64_t cost = (rows + k * at_once - 1) / (k * at_once) * (4 * k + 1);
    if (cost < least) best = k, least = cost;
  }
  return best;
}

Launch OnRows(const Kernel& kernel, const void* x, void* y, int64_t rows, int64_t n, double scale, const Gpu& gpu) {
  Launch launch = {kernel, {x, y, rows, n, 1, kernel.per_block, 0, 0, false, scale, static_cast<float>(scale)}, 0};
  Work& work = launch.work;
  const int64_t at_once = int64_t{kernel.blocks_per_processor} * gpu.processors;
  if (kernel.run_percent > 0 && rows >= 3 * at_once && rows <= kernel.most_turns * at_once) {
    work.runs = at_once;
    work.run_rows = rows * kernel.run_percent / 100 / at_once;
  } else if (kernel.most_rows > 1) {
    work.per_block = RowsPerBlock(kernel, rows, at_once);
  }
  const int64_t left = rows - work.runs * work.run_rows;
  launch.blocks = kernel.blocks_per_row * (work.runs + (left + work.per_block - 1) / work.per_block);
  work.meet = kernel.blocks_per_row > 1 && x == y;
  return launch;
}

// Two blocks that share a row can transform it in place where they can meet.
bool MaySplit(const Kernel& split, const void* x, const void* y, const Gpu& gpu) {
  return split.threads > 0 && split.shared_bytes <= gpu.shared_bytes && (gpu.clusters || x != y);
}

Launch OnRows(const RowsKernels& kernels, const void* x, void* y, int64_t rows, int64_t n, double scale,
              const Gpu& gpu) {
  if (rows * n <= kernels.split_elements * gpu.processors && MaySplit(kernels.split, x, y, gpu))
    return OnRows(kernels.split, x, y, rows, n, scale, gpu);
  const bool few = rows * n < kMany * gpu.processors || kernels.many.shared_bytes > gpu.shared_bytes;
  return OnRows(few ? kernels.few : kernels.many, x, y, rows, n, scale, gpu);
}

// The launch of a kernel on the columns of (n, stride) tiles; all of a block's are in one tile.
Launch OnColumns(Kernel kernel, const void* x, void* y, int64_t tiles, int64_t n, int64_t stride, double scale) {
  const int64_t per_block = std::min(kernel.per_block, stride);
  return {kernel,
          {x, y, tiles * stride, n, stride, per_block, 0, 0, false, scale, static_cast<float>(scale)},
          tiles * stride / per_block};
}

template <typename T>
std::vector<Launch> PlanFor(const Problem& p, const Buffers& b, const Gpu& gpu) {
  if (p.n <= kOnePass) {
    return {OnRows(FindRowsKernels<T, T>(Log2(p.n), Aligned(b.x, b.y)), b.x, b.y, p.rows, p.n, p.scale, gpu)};
  }
  if (p.n == kOnePassSplit && gpu.clusters) {
    const Kernel split = FindRowsKernels<T, T>(Log2(p.n), Aligned(b.x, b.y)).split;
    if (MaySplit(split, b.x, b.y, gpu)) return {OnRows(split, b.x, b.y, p.rows, p.n, p.scale, gpu)};
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

// Whether a device runs code for sm_90 or newer, in which kernels wait for the launch before them and blocks can meet:
// older code that the driver compiled for such a GPU does neither. All kernels are compiled alike, so one of them is
// asked, once for each device.
cudaError_t RunsCodeForSm90(int device, bool& runs) {
  constexpr int kDevices = 64;
  static std::atomic<int> architectures[kDevices];  // 90 for sm_90; 0 is not known yet
  int architecture = device < kDevices ? architectures[device].load() : 0;
  if (architecture == 0) {
    cudaFuncAttributes attributes{};
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, SharedKernel<float, float>(1).function))
      return error;
    architecture = attributes.ptxVersion;
    if (device < kDevices) architectures[device] = architecture;
  }
  runs = architecture >= 90;
  return cudaSuccess;
}

// The current device.
cudaError_t Describe(Gpu& gpu) {
  int clusters = 0;
  if (const cudaError_t error = cudaGetDevice(&gpu.device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&gpu.processors, cudaDevAttrMultiProcessorCount, gpu.device))
    return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, gpu.device)) return error;
  if (const cudaError_t error = RunsCodeForSm90(gpu.device, gpu.overlap)) return error;
  gpu.clusters = gpu.overlap && clusters;
  return cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.device);
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
  for (Launch& launch : Plan(problem, buffers, gpu)) {
    if (launch.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const Kernel& kernel = launch.kernel;
    // More than 48 KiB of shared memory has to be asked for, on each device; it is cheap, so at each launch.
    if (kernel.shared_bytes > 48 * 1024) {
      if (const cudaError_t error =
              cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes))
        return error;
    }
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.attrs = attributes;
    if (gpu.overlap) {  // a launch may begin while the one before it ends: every kernel waits for that itself
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.work.meet) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(kernel.blocks_per_row), 1, 1};
    }
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
    config.dynamicSmemBytes = static_cast<size_t>(kernel.shared_bytes);
    config.stream = stream;
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
