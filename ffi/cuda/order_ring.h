// order_ring.h: the shared memory of a block of OrderRing (order_ring.cuh), as host and device see it. Plain C++.
#pragma once

#include "../problem.h"

namespace jax_hadacore::cuda {

constexpr int kRingMultipliers = 3;  // warp groups; one more brings the rows
constexpr int kRingGroups = 16;      // of 8 elements, side by side: the columns of as many rows as it takes
constexpr int kMapWords = 32;        // of the tensor map of x, the first of a launch's words

// How many parts it is, at most, from one tile of a warp group to its next.
constexpr int TileStride(int tiles) { return (kRingMultipliers + tiles - 1) / tiles; }

// In order: the ring, whose parts are of that many rows; the matrix, as its elements where there is room, or as its
// words; a place for each warp that multiplies, through which its results leave; barriers, three for each part, and one
// for the matrix.
struct RingLayout {
  int columns, order;
  int together;  // groups of results that leave together
  bool elements;
  int parts;

  constexpr int RowsOfPart() const { return kRingGroups / columns; }
  constexpr int Padded() const { return (order + 15) / 16 * 16; }      // a's that products read
  constexpr int Tiles() const { return (order + 63) / 64; }            // of a's, a warp group's each
  constexpr int Slack() const { return 4 * Tiles() - Padded() / 16; }  // warps that have nothing in the last tile
  // In bytes. A row's first 8 columns come before the others.
  constexpr int Line() const { return (columns < 8 ? columns : 8) * 16; }
  constexpr int Plane() const { return Padded() * Line(); }
  constexpr int Planes() const { return columns * 16 / Line(); }
  constexpr int Row() const { return Planes() * Plane(); }
  constexpr int Part() const { return Row() * RowsOfPart(); }
  // A's of a plane that come in one box: 256 at most, and whole lines of 8.
  constexpr int Box() const { return Padded() <= 256 ? Padded() : Padded() / 2; }
  constexpr int RowWords() const { return static_cast<int>(SignWords(order)); }
  constexpr int MatrixAt() const { return parts * Part(); }
  // One word beyond the last is read, and not used.
  constexpr int Matrix() const { return elements ? 2 * Padded() * Padded() : (Padded() * RowWords() + 4) / 4 * 16; }
  constexpr int ResultsAt() const { return MatrixAt() + Matrix(); }
  constexpr int Results() const { return 8 * together * 16; }  // of 8 a's
  // Where rows become codes (QuantizedRing), results need no such place. Behind the words of the matrix are a barrier
  // there for each part, and for each part of this turn and the one before a Span of each warp that has results.
  static constexpr int kSpan = 8;
  constexpr int Spans() const { return Padded() / 16; }
  constexpr int KnownAt() const { return ResultsAt() + (Padded() * RowWords() + 4) / 4 * 16; }
  constexpr int SpansAt() const { return KnownAt() + 8 * parts; }
  constexpr bool HasSpans() const { return SpansAt() + 2 * parts * Spans() * kSpan <= BarriersAt(); }
  constexpr int BarriersAt() const { return ResultsAt() + kRingMultipliers * 4 * Results(); }
  constexpr int Bytes() const { return kAlignment + BarriersAt() + 8 * (3 * parts + 1); }

  static constexpr int kAlignment = 1024;
};

}  // namespace jax_hadacore::cuda
