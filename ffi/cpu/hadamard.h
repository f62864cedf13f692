// hadamard.h: the CPU transform, one copy of it for each instruction set, and the choice between them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace jax_hadacore::cpu {

// Which rows, parts or columns: [first, last).
struct Range {
  int64_t first, last;
};

// How many parts of a row JoinColumns joins.
constexpr int64_t kJoined = 8;

// One instruction set: its name, and the functions below compiled for it.
struct Isa {
  const char* name;
  void (*transform_rows)(const Problem& problem, Range rows, const void* x, void* y, void* buffer);
  void (*transform_parts)(const Problem& problem, int64_t length, Range parts, const void* x, void* buffer);
  void (*join_columns)(const Problem& problem, int64_t h, Range columns, void* buffer, void* y);
};

// The widest instruction set that this processor has, or the one selected by name.
const Isa& CurrentIsa();

// Selects an instruction set, for tests; false when this build or this processor has none of that name.
bool SelectIsa(const char* name);

// 16-bit elements are accumulated in float32.
constexpr int64_t AccumulatorBytes(Dtype dtype) { return dtype == Dtype::kF64 ? 8 : 4; }

// Whether the result's memory holds the accumulators.
constexpr bool AccumulatesInPlace(Dtype dtype) { return dtype == Dtype::kF32 || dtype == Dtype::kF64; }

// These use the current instruction set, and keep subnormals whatever the calling thread's floating-point mode.
// `buffer` holds accumulators: y itself where AccumulatesInPlace.

// Transforms rows; `buffer` holds one row.
void TransformRows(const Problem& problem, Range rows, const void* x, void* y, void* buffer);

// The strides below `length` of parts of that length, counted over all rows, into `buffer`, which holds all rows.
void TransformParts(const Problem& problem, int64_t length, Range parts, const void* x, void* buffer);

// The strides h, 2 h and 4 h, in `buffer`, or into y where they are the last. There are n / 8 columns in a row.
void JoinColumns(const Problem& problem, int64_t h, Range columns, void* buffer, void* y);

}  // namespace jax_hadacore::cpu
