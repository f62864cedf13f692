// isa_baseline.cc: the transform compiled for the architecture's minimum: SSE2 on x86-64, NEON on 64-bit Arm.
#include "isa.h"
#include "kernel.h"

namespace jax_hadacore::cpu {

constexpr Isa kBaseline = MakeIsa("baseline");

}  // namespace jax_hadacore::cpu
