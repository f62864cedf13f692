// order_ring.h: the shared memory of a block of OrderRing (order_ring.cuh), as host and device see it. Plain C++.
#pragma once

#include "../problem.h"

namespace jax_hadacore::cuda {

constexpr int kRingMultipliers = 3;  // warp groups; one more brings the rows
constexpr int kRingGroups = 16;      // of 8 elements, side by side: the columns of as many rows as it takes

// In order: the ring, whose parts are of that many rows; the matrix's words; a place for each warp that multiplies,
// through which its results leave; barriers, one for each part that has come and one for each that has been read.
struct RingLayout {
  int columns, order, parts;

  constexpr int RowsOfPart() const { return kRingGroups / columns; }
  constexpr int Tiles() const { return (order + 63) / 64; }        // of a's, a warp group's each
  constexpr int Padded() const { return (order + 15) / 16 * 16; }  // a's that products read
  // In bytes. A row's first 8 columns come before the others.
  constexpr int Line() const { return (columns < 8 ? columns : 8) * 16; }
  constexpr int Plane() const { return Padded() * Line(); }
  constexpr int Row() const { return Padded() * columns * 16; }
  constexpr int Part() const { return Row() * RowsOfPart(); }
  constexpr int RowWords() const { return static_cast<int>(SignWords(order)); }
  constexpr int WordsAt() const { return parts * Part(); }
  // One word beyond the last is read, and not used.
  constexpr int ResultsAt() const { return WordsAt() + (Padded() * RowWords() + 4) / 4 * 16; }
  constexpr int BarriersAt() const { return ResultsAt() + kRingMultipliers * 4 * kResults; }
  constexpr int Bytes() const { return kAlignment + BarriersAt() + 16 * parts; }

  static constexpr int kAlignment = 1024;
  static constexpr int kResults = 8 * kRingGroups * 16;  // half of a warp's
};

}  // namespace jax_hadacore::cuda
