// rows_f16.cu: the kernels of float16 rows.
#include "../rows_table.cuh"

namespace jax_hadacore::cuda {
template RowsKernels FindRowsKernels<F16, F16>(int, bool);
template RowsKernels FindRowsKernels<F16, float>(int, bool);
}  // namespace jax_hadacore::cuda
