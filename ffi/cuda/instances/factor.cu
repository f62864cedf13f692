// factor.cu: the kernels of factors and of signs by themselves.
#include "../factor.cuh"

namespace jax_hadacore::cuda {
template Kernel FactorKernel<F16, float>(int64_t, bool);
template Kernel FactorKernel<BF16, float>(int64_t, bool);
template Kernel FactorKernel<float, float>(int64_t, bool);
template Kernel FactorKernel<double, double>(int64_t, bool);
template Kernel SignsKernel<uint16_t>();
template Kernel SignsKernel<float>();
template Kernel SignsKernel<double>();
}  // namespace jax_hadacore::cuda
