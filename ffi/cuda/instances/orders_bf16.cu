// orders_bf16.cu: the kernels of bfloat16 rows whose length is no power of two.
#include "../order_rows.cuh"

namespace jax_hadacore::cuda {
template Kernel OrderRowsKernel<BF16>(int, int, bool, int);
}  // namespace jax_hadacore::cuda
