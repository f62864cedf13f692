// orders_f16.cu: the kernels of float16 rows whose length is no power of two.
#include "../group_rows.cuh"
#include "../order_ring.cuh"
#include "../order_rows.cuh"
#include "../pair_ring.cuh"

namespace jax_hadacore::cuda {
template Kernel OrderRowsKernel<F16>(int, int);
template Kernel OrderRingKernel<F16>(const RingLayout&);
template Kernel GroupRowsKernel<F16>(int, bool);
template Kernel PairRingKernel<F16>(int, int);
}  // namespace jax_hadacore::cuda
