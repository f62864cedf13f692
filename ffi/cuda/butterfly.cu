// butterfly.cu: the transform by butterflies in shared memory, for every length and type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "launch.h"

namespace jax_hadacore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTile = kOnePass;  // accumulators that a block holds in shared memory

template <typename A, typename T>
__device__ A Widen(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <typename T, typename A>
__device__ T Round(A value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// What a launch transforms: `vectors` vectors of n elements a `stride` apart. A vector's first element is
// (vector / stride) * stride * n + vector % stride; stride 1 means rows, a larger one the columns of (n, stride) tiles.
struct Layout {
  int64_t vectors;
  int64_t n;
  int64_t stride;
  int64_t per_block;  // vectors a block owns: consecutive rows, or consecutive columns of one tile
};

// Shared memory holds the block's vectors in the order of their addresses, so that loads and stores are coalesced and
// one loop of butterflies serves rows (their elements 1 apart) and columns (their elements per_block apart).
template <typename A, typename In, typename Out>
__global__ void __launch_bounds__(kThreads) Butterflies(const In* x, Out* y, Layout layout, A scale) {
  extern __shared__ double shared[];
  A* tile = reinterpret_cast<A*>(shared);
  const int64_t first = blockIdx.x * layout.per_block;
  const int64_t vectors = min(layout.per_block, layout.vectors - first);
  const int count = static_cast<int>(vectors * layout.n);
  const int step = layout.stride == 1 ? 1 : static_cast<int>(layout.per_block);
  const int64_t origin = first / layout.stride * layout.stride * layout.n + first % layout.stride;
  const auto address = [&](int i) { return origin + i / step * layout.stride + i % step; };

  for (int i = threadIdx.x; i < count; i += kThreads) tile[i] = Widen<A>(x[address(i)]);
  for (int h = step; h < step * layout.n; h *= 2) {
    __syncthreads();
    for (int pair = threadIdx.x; pair < count / 2; pair += kThreads) {
      const int i = pair / h * 2 * h + pair % h;
      const A a = tile[i], b = tile[i + h];
      tile[i] = a + b;
      tile[i + h] = a - b;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) y[address(i)] = Round<Out, A>(tile[i] * scale);
}

template <typename A, typename In, typename Out>
cudaError_t LaunchPass(const void* x, void* y, int64_t vectors, int64_t n, int64_t stride, double scale,
                       cudaStream_t stream) {
  const int64_t fit = kTile / n;
  const Layout layout = {vectors, n, stride, stride == 1 || fit < stride ? fit : stride};
  const int64_t blocks = (vectors + layout.per_block - 1) / layout.per_block;
  const int bytes = static_cast<int>(layout.per_block * n * sizeof(A));
  const auto kernel = Butterflies<A, In, Out>;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  // A block has 48 KiB without asking. The limit belongs to the device, so it is set at every launch.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(static_cast<const In*>(x), static_cast<Out*>(y),
                                                                     layout, static_cast<A>(scale));
  return cudaGetLastError();
}

// Rows up to kOnePass at once; longer ones as H_n = H_{n / kOnePass} (x) H_kOnePass: first the parts, then across them.
template <typename A, typename T>
cudaError_t LaunchTransform(const Problem& p, const void* x, void* y, void* workspace, cudaStream_t stream) {
  if (p.n <= kOnePass) return LaunchPass<A, T, T>(x, y, p.rows, p.n, 1, p.scale, stream);
  void* between = std::is_same_v<A, T> ? y : workspace;
  const int64_t parts = p.n / kOnePass;
  if (const cudaError_t error = LaunchPass<A, T, A>(x, between, p.rows * parts, kOnePass, 1, 1, stream)) return error;
  return LaunchPass<A, A, T>(between, y, p.rows * kOnePass, parts, kOnePass, p.scale, stream);
}

}  // namespace

cudaError_t Launch(const Problem& problem, const void* x, void* y, void* workspace, cudaStream_t stream) {
  switch (problem.dtype) {
    case Dtype::kF16: return LaunchTransform<float, __half>(problem, x, y, workspace, stream);
    case Dtype::kBF16: return LaunchTransform<float, __nv_bfloat16>(problem, x, y, workspace, stream);
    case Dtype::kF32: return LaunchTransform<float, float>(problem, x, y, workspace, stream);
    case Dtype::kF64: return LaunchTransform<double, double>(problem, x, y, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

std::string DriverProblem() {
  int driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver))
    return std::string("the NVIDIA driver does not answer: ") + cudaGetErrorString(error);
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  if (driver == 0) return "no NVIDIA driver";
  return "the NVIDIA driver supports CUDA " + name(driver) + ", but the kernels were built with CUDA " +
         name(CUDART_VERSION) + ": update the driver, or build from source with an older nvcc (12.8 or newer)";
}

std::string DeviceProblem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, Butterflies<float, float, float>);
  if (error == cudaSuccess) return "";
  return std::string("the kernels were not built for this GPU: ") + cudaGetErrorString(error);
}

}  // namespace jax_hadacore::cuda
