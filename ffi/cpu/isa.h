// isa.h: the instruction sets that the transform is compiled for, one isa_*.cc each.
#pragma once

#include "hadamard.h"

namespace jax_hadacore::cpu {

extern const Isa kBaseline;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

}  // namespace jax_hadacore::cpu
