// orders_f32.cu: the kernels of aligned float32 rows whose length is no power of two.
#include "../order_floats.cuh"

namespace jax_hadacore::cuda {
template Kernel OrderFloatsKernel<false>(int64_t);
}  // namespace jax_hadacore::cuda
