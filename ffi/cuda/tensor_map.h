// tensor_map.h: how the engine that copies tensors to shared memory sees the rows of a ring.
#pragma once

#include <optional>

#include "order_ring.h"
#include "order_words.h"

namespace jax_hadacore::cuda {

// The kMapWords words of a tensor map of rows of n elements: (row, plane, a, what is in a line), with boxes of
// ring.Box() a's of a plane. x is aligned to 16 bytes, and so are rows. None where the driver makes none.
std::optional<Words> TensorMap(const void* x, int64_t rows, int64_t n, const RingLayout& ring);

}  // namespace jax_hadacore::cuda
