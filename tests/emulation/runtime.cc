// runtime.cc: the part of CUDA's runtime that ffi/cuda/launch.cc uses: it tells of the device, and starts kernels.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "device.h"
#include "machine.h"
#undef blockDim  // is a member of cudaLaunchConfig_t here

// The kernels' shared memory, by the name that they give it.
namespace jax_hadacore::cuda {
alignas(128) float4 shared_memory[emulation::kMaxShared / sizeof(float4)];
}  // namespace jax_hadacore::cuda

namespace emulation {

uint32_t launch;
bool overlap;
std::map<const void*, int> kernel_words;

namespace {

const void* kernel;
const void* argument;
std::map<const void*, int> shared_limits;

template <typename Argument>
void Call() {
  reinterpret_cast<void (*)(Argument)>(const_cast<void*>(kernel))(*static_cast<const Argument*>(argument));
}

// A kernel that takes kWords words, or half as many, ...
template <int kWords>
void CallSigned(int words) {
  if (words == kWords) Call<jax_hadacore::cuda::WorkAndWords<kWords>>();
  if constexpr (kWords > 1) CallSigned<kWords / 2>(words);
}

}  // namespace

void CallKernel() {
  using namespace jax_hadacore::cuda;
  const int words = kernel_words.at(kernel);
  if (words == 0) Call<Work>();
  if (words == kFewWords) Call<WorkAndWords<kFewWords>>();
  if (words == kManyWords) Call<WorkAndWords<kManyWords>>();
  if (words == kQuantizedWords) Call<WorkAndWords<kQuantizedWords>>();
  CallSigned<kOnePass / 32>(words);
}

}  // namespace emulation

// What the device's code can do is asked once: one that has warp groups is another device.
cudaError_t cudaGetDevice(int* device) {
  *device = emulation::machine.warp_groups;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulation::machine.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::machine.shared_bytes; break;
    case cudaDevAttrClusterLaunch: *value = emulation::machine.clusters; break;
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  attributes->numRegs = emulation::machine.warp_groups ? 128 : 4;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  emulation::shared_limits[function] = value;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return emulation::error.c_str(); }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  using namespace emulation;
  const unsigned grid = config->gridDim.x, count = config->blockDim.x;
  const size_t bytes = config->dynamicSmemBytes;
  const auto limit = shared_limits.find(function);
  unsigned size = 1;  // of a cluster
  overlap = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) size = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlap = attribute.val.programmaticStreamSerializationAllowed;
  }
  if (grid == 0 || grid > INT32_MAX || size > (machine.clusters ? kMaxCluster : 1) || grid % size || count == 0 ||
      count > kMaxThreads || count % kWarp ||
      bytes > (limit == shared_limits.end() ? 48u * 1024 : static_cast<size_t>(limit->second)) ||
      bytes > static_cast<size_t>(machine.shared_bytes)) {
    error = "launch of " + std::to_string(grid) + " blocks, " + std::to_string(size) + " to a cluster, of " +
            std::to_string(count) + " threads and " + std::to_string(bytes) + " bytes of shared memory";
    return cudaErrorInvalidConfiguration;
  }
  kernel = function;
  argument = arguments[0];
  ++launch;
  Watch(Shared(jax_hadacore::cuda::shared_memory, bytes));
  for (unsigned first = 0; first < grid && error.empty(); first += size)
    RunCluster(first, static_cast<int>(size), static_cast<int>(count));
  memories.erase(std::remove_if(memories.begin(), memories.end(), [](const Memory& memory) { return memory.shared; }),
                 memories.end());
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
