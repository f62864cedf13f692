// shared.cu: the kernels of doubles and of columns.
#include "../shared.cuh"

namespace jax_hadacore::cuda {
template Kernel SharedKernel<float, F16>(int64_t);
template Kernel SharedKernel<float, BF16>(int64_t);
template Kernel SharedKernel<float, float>(int64_t);
template Kernel SharedKernel<double, double>(int64_t);
}  // namespace jax_hadacore::cuda
