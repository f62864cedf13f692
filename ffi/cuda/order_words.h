// order_words.h: the signs that travel with the launch of an OrderRows kernel.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../problem.h"

namespace jax_hadacore::cuda {

using Words = std::vector<uint32_t>;

// The matrix F (x) H of a factor and a power of two, its rows padded to a multiple of 16 with rows of no meaning.
// Repeated calls return the same object.
std::shared_ptr<const Words> FirstStepWords(const Factor& factor, int64_t power);

// Whether element i is minus.
uint32_t SignOf(const uint32_t* words, int64_t i);

// Appends `rows` rows of `row_words` words, of which the first ones are the factor's.
void AppendFactor(Words& words, const Factor& factor, int64_t rows, int64_t row_words);

// The words of that many rows and columns.
constexpr int64_t FirstStepSize(int64_t order) { return (order + 15) / 16 * 16 * SignWords(order); }

}  // namespace jax_hadacore::cuda
