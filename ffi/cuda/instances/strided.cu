// strided.cu: the kernels of 16-bit columns.
#include "../strided_rows.cuh"

namespace jax_hadacore::cuda {
template StridedKernel FindStridedKernel<F16>(int);
template StridedKernel FindStridedKernel<BF16>(int);
}  // namespace jax_hadacore::cuda
