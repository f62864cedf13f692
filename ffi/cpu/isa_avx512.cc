// isa_avx512.cc: the transform compiled for AVX-512 (F, BW, DQ, VL).
#include "isa.h"
#include "kernel.h"

namespace jax_hadacore::cpu {

const Isa kAvx512 = {"avx512", TransformRows};

}  // namespace jax_hadacore::cpu
