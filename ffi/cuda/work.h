// work.h: what a kernel is given, and what the host knows of a kernel.
#pragma once

#include <cstdint>

#include "../quantization.h"

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
  // The first `runs` blocks take every runs-th row instead, run_rows of them.
  int64_t runs;
  int64_t run_rows;
  bool meet;  // the blocks that share a row have all read it before one of them writes
  double scale;
  float float_scale;  // the same for all but doubles: a kernel would be slow to convert it

  // Of rows whose length is no power of two (order_rows.cuh, order_ring.cuh, group_rows.cuh; factor.cuh has its own use
  // of the first two):
  int order;     // of the first step's matrix
  int columns;   // that the second step transforms
  int ring;      // parts that the ring of order_ring.cuh has, or rows that a block of quantized_orders.cuh has room for
  bool aligned;  // to 16 bytes: x, y and every block's first row
  // Of kernels that apply signs:
  const uint32_t* device_signs;  // of a row's elements; null where they are among the words, or there are none
  int words_before_signs;        // among the words; -1 where there are no signs
  float scale_rest;              // what float_scale lacks of the scale: n**-0.5 may be far from any float
  bool signs_last;               // they are applied after the transform

  // Of kernels whose results are codes (quantizer.cuh):
  void* scales;
  int8_t* zero_points;
  const float* given;
  float steps, inverse_steps;  // a float32 scale is an extent divided by so many
  Code code;
  Scale scale_type;
  int group_bits;  // 2^group_bits consecutive results share a scale
};

// What these kernels are given: signs of matrices and elements, packed as in problem.h, travel with the launch. With
// kManyWords it is about the most that a launch may have.
constexpr int kFewWords = 1008, kManyWords = 7900;
template <int kWords>
struct WorkAndWords {
  Work work;
  alignas(64) uint32_t words[kWords];
};

// The formats of codes that one kernel is compiled for: those with a scale to each row; those with one to each group of
// a row, but float4; float4, always with such groups.
enum class Formats { kOfRows, kOfGroups, kFloat4 };

// A kernel as a row of the launch table.
struct Kernel {
  const char* name;
  const void* function;
  int threads;
  int shared_bytes;
  int64_t per_block = 1;         // vectors that a block holds at once
  int blocks_per_row = 1;        // 2: two neighbouring blocks share each row
  int blocks_per_processor = 0;  // how many run at once, where one fills much of a multiprocessor
  // Of the rows that such a block may take one after the other (see Staged in long_rows.cuh):
  int most_rows = 1;
  int run_percent = 0;
  int most_turns = 0;
  // How many its WorkAndWords has; 0: it takes a Work.
  int words = 0;
};

}  // namespace jax_hadacore::cuda
