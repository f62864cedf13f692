// hadamard.h: the CPU transform, one copy of it for each instruction set, and the choice between them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace jax_hadacore::cpu {

// Transforms rows [0, problem.rows) of x into y. `scratch` holds ScratchBytes(problem) bytes.
using TransformFn = void(const Problem& problem, const void* x, void* y, void* scratch);

// One instruction set: its name, and the transform compiled for it.
struct Isa {
  const char* name;
  TransformFn* transform;
};

// The widest instruction set that this processor has, or the one selected by name.
const Isa& CurrentIsa();

// Selects an instruction set, for tests; false when this build or this processor has none of that name.
bool SelectIsa(const char* name);

// The scratch that one thread needs: rows of 16-bit elements are transformed in float32.
size_t ScratchBytes(const Problem& problem);

// Transforms with the current instruction set and subnormals kept, whatever the calling thread's floating-point mode.
void Transform(const Problem& problem, const void* x, void* y, void* scratch);

}  // namespace jax_hadacore::cpu
