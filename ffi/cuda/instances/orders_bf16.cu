// orders_bf16.cu: the kernels of bfloat16 rows whose length is no power of two.
#include "../group_rows.cuh"
#include "../order_ring.cuh"
#include "../order_rows.cuh"
#include "../pair_ring.cuh"

namespace jax_hadacore::cuda {
template Kernel OrderRowsKernel<BF16>(int, int);
template Kernel OrderRingKernel<BF16>(const RingLayout&);
template Kernel GroupRowsKernel<BF16>(int, bool);
template Kernel PairRingKernel<BF16>(int, int);
}  // namespace jax_hadacore::cuda
