// factor_sums.h: what the step of a factor adds up, and where it keeps it: the same for every instruction set.
//
// Columns are done in strips that fill a cache line with accumulators. Of a column, four inputs are taken at a time:
// where the matrix is of signs, their 16 signed sums are made first, and each result picks one of them, which is a
// quarter of the additions. A table holds these, as strips, for a block of 16 fours. What a result picks there is added
// up pairwise; blocks are added one after the other, but only four of them to a sum, and then the sums. So errors grow
// with the logarithm of the order, not with its root, and the tree of a result depends on the order alone.
#pragma once

#include <cstdint>
#include <memory>

#include "../problem.h"

namespace jax_hadacore::cpu {

constexpr int64_t kStripBytes = 64;
constexpr int64_t kFourBytes = 16 * kStripBytes;
constexpr int64_t kBlock = 16;
constexpr int64_t kFoursPerSum = 4 * kBlock;

constexpr int64_t kTableBytes = kBlock * kFourBytes;

// A strip for every sum of every result, of the factor that has the most.
int64_t SumsBytes(const Problem& problem);

// For every block and result, where in the table the kBlock strips are that it adds up, in bytes. Null for a matrix
// that is not of signs.
//
// Of the 16 signed sums of inputs 4 i, ... 4 i + 3, bits 0 to 3 of the one that a result picks are the signs of 4 i,
// 4 i + 2, 4 i + 1 and 4 i + 3: neighbours among packed signs stay neighbours.
std::unique_ptr<uint16_t[]> MakePicks(const Factor& factor);

}  // namespace jax_hadacore::cpu
