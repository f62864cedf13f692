// hadamard.h: the CPU transform, and with it the quantisation of its results: one copy of them for each instruction
// set, and the choice between these.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>

#include "../problem.h"
#include "../quantization.h"

namespace jax_hadacore::cpu {

// Which rows, parts or columns: [first, last).
struct Range {
  int64_t first, last;
};

// How many parts of a row of 2^m elements JoinColumns joins.
constexpr int64_t kJoined = 8;

// How many parts JoinColumns joins in the last place.
constexpr int64_t PartsJoined(const Problem& problem) {
  return problem.factor_count ? problem.factors[0].order : kJoined;
}

// Rows that are done together: as many as fit the nearest cache, but at least so many that there are strips to fill.
constexpr int64_t RowsForStrips(const Problem& problem) {
  return problem.factor_count && problem.n / problem.factors[0].order < 16 ? 16 : 1;
}
constexpr int64_t RowsTogether(const Problem& problem) {
  const int64_t least = RowsForStrips(problem), fit = 4096 / (problem.n > 0 ? problem.n : 1) / least;
  return fit > 1 ? fit * least : least;
}

// The fewest rows that are whole groups; where the scale is given, whole bytes of codes.
constexpr int64_t RowsOfGroups(const Problem& problem, const Quantization& quantization) {
  if (problem.n == 0) return 1;
  const int64_t elements = quantization.scale == Scale::kGiven ? 8 / CodeBits(quantization.code) : quantization.group;
  return std::lcm(problem.n, elements) / problem.n;
}

// Rows that are quantised together: as many as are transformed together, but whole groups.
constexpr int64_t RowsQuantized(const Problem& problem, const Quantization& quantization) {
  const int64_t least = RowsOfGroups(problem, quantization), fit = RowsTogether(problem) / least;
  return fit > 1 ? fit * least : least;
}

// What a thread works with besides operand and result (factor_sums.h).
struct Memory {
  void* buffer;  // accumulators; the result itself where AccumulatesInPlace; results that are to be quantised
  void* table;
  void* sums;
  const uint16_t* picks[2];  // of each factor that is of signs
};

// One instruction set: its name, and the functions below compiled for it.
struct Isa {
  const char* name;
  void (*transform_rows)(const Problem& problem, Range rows, const void* x, void* y, const Memory& memory);
  void (*transform_parts)(const Problem& problem, int64_t length, Range parts, const void* x, void* y,
                          const Memory& memory);
  void (*join_columns)(const Problem& problem, int64_t h, Range columns, void* y, const Memory& memory);
  void (*quantize_rows)(const Problem& problem, const Quantization& quantization, Range rows, const void* x,
                        const QuantizedBuffers& results, const Memory& memory);
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

// Transforms rows. The buffer holds RowsTogether.
void TransformRows(const Problem& problem, Range rows, const void* x, void* y, const Memory& memory);

// What is inside parts of `length` elements, counted over all rows: their butterflies and the steps of all factors but
// the first. The buffer holds all rows. Signs that come first change x into y on the way.
void TransformParts(const Problem& problem, int64_t length, Range parts, const void* x, void* y, const Memory& memory);

// Joins parts of h elements in the buffer, into y where these are rows then: by the strides h, 2 h and 4 h, or by the
// step of the first factor. Columns are counted over all parts that are joined; their range and h are multiples of 32.
void JoinColumns(const Problem& problem, int64_t h, Range columns, void* y, const Memory& memory);

// Transforms rows, whole groups, into float32 and quantises these. The buffer holds RowsQuantized; not for float64.
void QuantizeRows(const Problem& problem, const Quantization& quantization, Range rows, const void* x,
                  const QuantizedBuffers& results, const Memory& memory);

}  // namespace jax_hadacore::cpu
