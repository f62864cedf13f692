// quantized_orders.cu: the kernels of 16-bit rows whose length is no power of two and whose results become codes.
#include "../order_ring.cuh"
#include "../quantized_orders.cuh"

namespace jax_hadacore::cuda {
template Kernel QuantizedOrdersKernel<F16>(Formats);
template Kernel QuantizedOrdersKernel<BF16>(Formats);
template Kernel QuantizedRingKernel<F16>(Formats);
template Kernel QuantizedRingKernel<BF16>(Formats);
}  // namespace jax_hadacore::cuda
