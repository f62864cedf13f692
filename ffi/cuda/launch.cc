// launch.cc: the launches of a plan, and what the device can do.
#include "launch.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jax_hadacore::cuda {
namespace {

// Asks a kernel, once for each device, what the code is that the device runs; all are compiled alike. In code for sm_90
// or newer kernels wait for the launch before them and blocks can meet: older code that the driver compiled for such a
// GPU does neither. Only in code for sm_90a is OrderRing not empty, and has registers.
cudaError_t DescribeCode(Gpu& gpu) {
  constexpr int kDevices = 64, kAsked = 1, kSm90 = 2, kSm90a = 4;
  static std::atomic<int> answers[kDevices];
  int answer = gpu.device < kDevices ? answers[gpu.device].load() : 0;
  if (answer == 0) {
    cudaFuncAttributes attributes{};
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, OrderRingKernel<BF16>({}).function)) return error;
    answer = kAsked | (attributes.ptxVersion >= 90 ? kSm90 : 0) | (attributes.numRegs > 64 ? kSm90a : 0);
    if (gpu.device < kDevices) answers[gpu.device] = answer;
  }
  gpu.overlap = answer & kSm90;
  gpu.warp_groups = answer & kSm90a;
  return cudaSuccess;
}

// The current device.
cudaError_t Describe(Gpu& gpu) {
  int clusters = 0;
  if (const cudaError_t error = cudaGetDevice(&gpu.device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&gpu.processors, cudaDevAttrMultiProcessorCount, gpu.device))
    return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, gpu.device)) return error;
  if (const cudaError_t error = DescribeCode(gpu)) return error;
  gpu.clusters = gpu.overlap && clusters;
  return cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.device);
}

cudaError_t Enqueue(const std::vector<Launch>& launches, const Gpu& gpu, cudaStream_t stream) {
  for (const Launch& launch : launches) {
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
    // The words follow the work, as in WorkAndWords.
    alignas(WorkAndWords<kManyWords>) char argument[sizeof(WorkAndWords<kManyWords>)];
    std::memcpy(argument, &launch.work, sizeof launch.work);
    if (!launch.words.empty())
      std::memcpy(argument + offsetof(WorkAndWords<kManyWords>, words), launch.words.data(),
                  launch.words.size() * sizeof(uint32_t));
    void* arguments[] = {argument};
    if (const cudaError_t error = cudaLaunchKernelExC(&config, kernel.function, arguments)) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t Enqueue(const Problem& problem, const Buffers& buffers, cudaStream_t stream) {
  Gpu gpu{};
  if (const cudaError_t error = Describe(gpu)) return error;
  return Enqueue(Plan(problem, buffers, gpu), gpu, stream);
}

cudaError_t EnqueueCodes(const Problem& problem, const Quantization& quantization, const void* x,
                         const QuantizedBuffers& results, cudaStream_t stream) {
  Gpu gpu{};
  if (const cudaError_t error = Describe(gpu)) return error;
  return Enqueue({PlanCodes(problem, quantization, x, results, gpu)}, gpu, stream);
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
