// factor_sums.cc: picks from packed signs, eight at a time.
#include "factor_sums.h"

#include <algorithm>
#include <cstring>

namespace jax_hadacore::cpu {

int64_t SumsBytes(const Problem& problem) {
  int64_t most = 0;
  for (int i = 0; i < problem.factor_count; ++i) {
    const int64_t order = problem.factors[i].order, sums = (order + 4 * kFoursPerSum - 1) / (4 * kFoursPerSum);
    most = std::max(most, order * sums * kStripBytes);
  }
  return most;
}

std::unique_ptr<uint16_t[]> MakePicks(const Factor& factor) {
  if (!factor.signs) return nullptr;
  using Eight = uint16_t __attribute__((vector_size(16)));  // for the eight fours of a word
  constexpr Eight kToTop = {1 << 14, 1 << 12, 1 << 10, 1 << 8, 1 << 6, 1 << 4, 1 << 2, 1};
  constexpr Eight kFour = {
      0, kFourBytes, 2 * kFourBytes, 3 * kFourBytes, 4 * kFourBytes, 5 * kFourBytes, 6 * kFourBytes, 7 * kFourBytes};
  static_assert(kBlock == 16, "two words of signs are a block");
  const int64_t words = SignWords(factor.order), blocks = (words + 1) / 2;
  std::unique_ptr<uint16_t[]> picks(new uint16_t[static_cast<size_t>(blocks * factor.order * kBlock)]);
  for (int64_t row = 0; row < factor.order; ++row) {
    for (int64_t word = 0; word < words; ++word) {
      const uint32_t signs = factor.signs[row * words + word];
      const auto even = static_cast<uint16_t>(signs), odd = static_cast<uint16_t>(signs >> 16);
      const auto first = static_cast<uint16_t>(word % 2 * 8 * kFourBytes);
      const Eight choices = ((Eight{} + even) * kToTop >> 14) | ((Eight{} + odd) * kToTop >> 14) << 2;
      const Eight offsets = choices * static_cast<uint16_t>(kStripBytes) + kFour + first;
      const int64_t to = (word / 2 * factor.order + row) * kBlock + word % 2 * 8;
      std::memcpy(&picks[static_cast<size_t>(to)], &offsets, sizeof offsets);
    }
  }
  return picks;
}

}  // namespace jax_hadacore::cpu
