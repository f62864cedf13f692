// rows_bf16.cu: the kernels of bfloat16 rows.
#include "../rows_table.cuh"

namespace jax_hadacore::cuda {
template RowsKernels FindRowsKernels<BF16, BF16>(int, bool);
template RowsKernels FindRowsKernels<BF16, float>(int, bool);
}  // namespace jax_hadacore::cuda
