// tensor_map.cc: takes the place of ffi/cuda/tensor_map.cc, which asks a driver.
#include "cuda/tensor_map.h"

#include <cstring>

#include "device.h"
#include "ptx.cuh"

namespace jax_hadacore::cuda {

std::optional<Words> TensorMap(const void* x, int64_t rows, int64_t n, const RingLayout& ring) {
  const emulation::BoxedRows boxed = {
      static_cast<const char*>(x), rows,      ring.order, 16 * ring.columns, ring.Line(),
      static_cast<int>(2 * n),     ring.Box()};
  static_assert(sizeof boxed <= kMapWords * sizeof(uint32_t));
  Words words(kMapWords);
  std::memcpy(words.data(), &boxed, sizeof boxed);
  return words;
}

}  // namespace jax_hadacore::cuda
