// isa_avx2.cc: the transform compiled for AVX2 with F16C.
#include "isa.h"
#include "kernel.h"

namespace jax_hadacore::cpu {

const Isa kAvx2 = {"avx2", TransformRows};

}  // namespace jax_hadacore::cpu
