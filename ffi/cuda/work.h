// work.h: what a kernel is given, and what the host knows of a kernel.
#pragma once

#include <cstdint>

namespace jax_hadacore::cuda {

// The only parameter of every kernel: `count` vectors of n elements to transform and scale. A vector's elements are
// `stride` apart: 1 means that the vectors are rows; a larger one that they are the columns of (n, stride) tiles.
struct Work {
  const void* x;
  void* y;  // may be x
  int64_t count;
  int64_t n;
  int64_t stride;
  int64_t per_block;  // consecutive vectors that a block transforms
  double scale;
};

// A kernel as a row of the launch table.
struct Kernel {
  const char* name;
  const void* function;
  int threads;
  int shared_bytes;
  int64_t per_block;         // vectors that a block holds at once
  int most_rows;             // how many a block gains from taking one after the other, where one fills it; else 0
  int blocks_per_processor;  // how many of those run at once
};

}  // namespace jax_hadacore::cuda
