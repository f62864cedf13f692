// signs.h: changes the signs of stored elements.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace jax_hadacore::cpu {
namespace {

// 32 elements are as many lanes of 32 or 64 bits, or 16 lanes of two 16-bit elements each. For every lane, how far left
// its sign's bit of a word of signs (problem.h) is from the lane's sign.
template <typename Lane, bool kPairs>
struct SignShifts {
  static constexpr int kCount = kPairs ? 16 : 32;
  Lane shift[kCount];
  constexpr SignShifts() : shift() {
    for (int i = 0; i < kCount; ++i)
      shift[i] = static_cast<Lane>(kPairs ? 15 - i : static_cast<int>(8 * sizeof(Lane)) - 1 - (i / 2 + i % 2 * 16));
  }
};

// `count` elements of a row from one on whose signs begin a word, from x to y, which may be the same.
template <typename S>
void Flip(const S* x, int64_t count, const uint32_t* signs, S* y) {
  constexpr bool kPairs = sizeof(S) == 2;
  using Lane = Bits<S>;
  using V = Vector<Lane, kLanes<Lane>>;
  static constexpr SignShifts<Lane, kPairs> kShifts;
  constexpr Lane kSign = kPairs ? 0x80008000 : Lane{1} << (8 * sizeof(Lane) - 1);
  const auto flip = [](const S* from, Lane word, S* to) {
    for (int i = 0; i < kShifts.kCount; i += kLanes<Lane>) {
      V v, shifts;
      std::memcpy(&v, from + (i << kPairs), sizeof v);
      std::memcpy(&shifts, kShifts.shift + i, sizeof shifts);
      v ^= (V{} + word) << shifts & kSign;
      std::memcpy(to + (i << kPairs), &v, sizeof v);
    }
  };
  for (; count >= 32; count -= 32, x += 32, y += 32) flip(x, *signs++, y);
  if (count == 0) return;
  S tail[32];
  std::memcpy(tail, x, static_cast<size_t>(count) * sizeof(S));
  flip(tail, *signs, tail);
  std::memcpy(y, tail, static_cast<size_t>(count) * sizeof(S));
}

}  // namespace
}  // namespace jax_hadacore::cpu
