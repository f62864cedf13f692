// order_words.cc: Kronecker products of packed signs, and a memory of them.
#include "order_words.h"

#include <algorithm>
#include <mutex>

namespace jax_hadacore::cuda {
namespace {

int BitOf(int64_t i) { return static_cast<int>(i % 32 / 2 + i % 2 * 16); }

Words Expand(const Factor& factor, int64_t power) {
  const int64_t order = factor.order * power, row_words = SignWords(order);
  Words words(static_cast<size_t>(FirstStepSize(order)));
  for (int64_t row = 0; row < order; ++row) {
    const uint32_t* const of_factor = factor.signs + row / power * SignWords(factor.order);
    uint32_t* const to = words.data() + row * row_words;
    for (int64_t column = 0; column < order; ++column) {
      int64_t both = row % power & column % power;
      uint32_t minus = SignOf(of_factor, column / power);
      for (; both; both &= both - 1) minus ^= 1;
      to[column / 32] |= minus << BitOf(column);
    }
  }
  return words;
}

}  // namespace

void AppendFactor(Words& words, const Factor& factor, int64_t rows, int64_t row_words) {
  const int64_t given = SignWords(factor.order);
  for (int64_t row = 0; row < rows; ++row) {
    const bool there = row < factor.order;
    if (there) words.insert(words.end(), factor.signs + row * given, factor.signs + (row + 1) * given);
    words.insert(words.end(), static_cast<size_t>(row_words - (there ? given : 0)), 0);
  }
}

uint32_t SignOf(const uint32_t* words, int64_t i) { return words[i / 32] >> BitOf(i) & 1; }

std::shared_ptr<const Words> FirstStepWords(const Factor& factor, int64_t power) {
  struct Entry {
    Words factor;
    int64_t order, power;
    std::shared_ptr<const Words> words;
  };
  // A program calls with few matrices, again and again; the last ones of many are kept.
  constexpr size_t kMost = 64;
  static std::mutex mutex;
  static std::vector<Entry> entries;
  const int64_t size = factor.order * SignWords(factor.order);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& entry : entries)
    if (entry.order == factor.order && entry.power == power &&
        std::equal(entry.factor.begin(), entry.factor.end(), factor.signs))
      return entry.words;
  if (entries.size() == kMost) entries.erase(entries.begin());
  entries.push_back({Words(factor.signs, factor.signs + size), factor.order, power,
                     std::make_shared<const Words>(Expand(factor, power))});
  return entries.back().words;
}

}  // namespace jax_hadacore::cuda
