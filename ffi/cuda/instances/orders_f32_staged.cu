// orders_f32_staged.cu: the kernels of float32 rows whose length is no power of two, through shared memory.
#include "../order_floats.cuh"

namespace jax_hadacore::cuda {
template Kernel OrderFloatsKernel<true>(int64_t);
}  // namespace jax_hadacore::cuda
