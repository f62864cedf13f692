// isa_avx2.cc: the transform compiled for AVX2 with FMA and F16C.
#include "isa.h"
#include "kernel.h"

namespace jax_hadacore::cpu {

constexpr Isa kAvx2 = MakeIsa("avx2");

}  // namespace jax_hadacore::cpu
