// quantized_f16.cu: the kernels of float16 rows whose results become codes.
#include "../quantized_rows.cuh"

namespace jax_hadacore::cuda {
template Kernel QuantizedRowsKernel<F16>(int, Formats, int64_t);
}  // namespace jax_hadacore::cuda
