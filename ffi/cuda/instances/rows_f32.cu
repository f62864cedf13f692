// rows_f32.cu: the kernels of float32 rows.
#include "../rows_table.cuh"

namespace jax_hadacore::cuda {
template RowsKernels FindRowsKernels<float, float>(int, bool);
}  // namespace jax_hadacore::cuda
