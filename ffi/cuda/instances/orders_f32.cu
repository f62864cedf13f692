// orders_f32.cu: the kernels of float32 rows whose length is no power of two.
#include "../order_floats.cuh"

namespace jax_hadacore::cuda {
Kernel OrderFloatsKernel(int64_t order, bool staged) {
  return FindOrderFloatsKernel(order, staged,
                               std::integer_sequence<int, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24>{});
}
}  // namespace jax_hadacore::cuda
