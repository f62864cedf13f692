// columns.cu: the kernels of short columns.
#include "../columns.cuh"

namespace jax_hadacore::cuda {
template Kernel ColumnsKernel<F16>(int);
template Kernel ColumnsKernel<BF16>(int);
template Kernel ColumnsKernel<float>(int);
}  // namespace jax_hadacore::cuda
