// orders_f32.cu: the kernels of float32 rows whose length is no power of two.
#include "../order_floats.cuh"

namespace jax_hadacore::cuda {
Kernel OrderFloatsKernel(int bits) {
  return FindOrderFloatsKernel(bits, std::make_integer_sequence<int, kMostFloatBits + 1>{});
}
}  // namespace jax_hadacore::cuda
