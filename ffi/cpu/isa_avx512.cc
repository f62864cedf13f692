// isa_avx512.cc: the transform compiled for AVX-512 (F, BW, DQ, VL).
#include "isa.h"
#include "kernel.h"

namespace jax_hadacore::cpu {

constexpr Isa kAvx512 = MakeIsa("avx512");

}  // namespace jax_hadacore::cpu
