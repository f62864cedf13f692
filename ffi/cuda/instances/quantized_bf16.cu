// quantized_bf16.cu: the kernels of bfloat16 rows whose results become codes.
#include "../quantized_rows.cuh"

namespace jax_hadacore::cuda {
template Kernel QuantizedRowsKernel<BF16>(int, Formats, int64_t);
}  // namespace jax_hadacore::cuda
