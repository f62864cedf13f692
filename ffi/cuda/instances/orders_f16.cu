// orders_f16.cu: the kernels of float16 rows whose length is no power of two.
#include "../order_rows.cuh"

namespace jax_hadacore::cuda {
template Kernel OrderRowsKernel<F16>(int, int, bool, int);
}  // namespace jax_hadacore::cuda
