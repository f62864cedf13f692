// measure.h: times of a transform and of memcpy of the same bytes, side by side.
#pragma once

#include <vector>

#include "../problem.h"

namespace jax_hadacore::cpu {

// Milliseconds, one value for each repetition: the mean of as many calls as fill 0.1 ms.
struct Times {
  std::vector<double> transform, memcpy;
};

// Times the transform of x into y and copies of x, in turn, on `threads` threads that are awake already. memcpy copies
// x to y, or to memory of its own where the transform is in place (x == y). In the end y holds the transform, where it
// is in place that of several calls. Throws std::bad_alloc, and std::invalid_argument for counts that make no sense.
Times Measure(const Problem& problem, const void* x, void* y, int threads, int repetitions);

}  // namespace jax_hadacore::cpu
