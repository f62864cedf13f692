// pair_ring.h: the shared memory of a block of PairRing (pair_ring.cuh), as host and device see it. Plain C++.
#pragma once

#include "order_ring.h"

namespace jax_hadacore::cuda {

constexpr int kPairBringers = 4;             // warps that bring rows
constexpr int kPairAhead = 12 * 1024;        // bytes that each of them has on their way, at most
constexpr int kPairChunk = 8 * 2;            // bytes, 8 elements
constexpr int kPairMatrix = 8 * kPairChunk;  // bytes: a line of 8 columns, 8 elements of each

// In order: the ring, whose parts are a row each; the second matrix as operand B; pieces of rows on their way; a chunk
// of zeros; the first matrix's signs, as operand A; barriers, one for each part that has come and one for each that
// has been read, for each piece that has come, and one for the matrices.
struct PairLayout {
  int width, apart;    // elements of a group, and groups side by side
  int eights;          // of columns, that there is room for
  int order, columns;  // of the first step's matrix and the second's
  int parts;

  constexpr int Tiles() const { return (order + 63) / 64; }  // of a's, a warp group's each
  constexpr int Steps() const { return (order + 15) / 16; }  // of a product, and times that warps have rows
  // A piece is the groups of two columns. Tasks bring 16 chunks of each, down to the last step.
  constexpr int Pieces() const { return columns / 2; }  // of a row
  constexpr int Chunks() const { return order * width / 8; }
  constexpr int Tasks() const { return (Chunks() + 15) / 16; }
  constexpr int Piece() const { return 2 * Chunks() * kPairChunk; }  // bytes
  constexpr int Ahead() const { return kPairAhead / Piece(); }       // pieces
  // In bytes: 8 columns; a plane, which has the same element of all groups; and all planes. The elements of a chunk go
  // to the same place of each plane, which are in different banks.
  constexpr int Eight() const {
    return Tasks() * 16 / width * kPairMatrix + (width == 4 && eights % 2 ? 2 : 1) * kPairChunk;
  }
  constexpr int Plane() const { return eights * Eight(); }
  constexpr int Part() const { return width * Plane(); }
  constexpr int SecondEight() const { return (eights + 1) / 2 * 2 * kPairMatrix; }

  constexpr int SecondAt() const { return parts * Part(); }
  constexpr int PiecesAt() const { return SecondAt() + eights * SecondEight(); }
  constexpr int ZerosAt() const { return PiecesAt() + kPairBringers * Ahead() * Piece(); }
  constexpr int SignsAt() const { return ZerosAt() + kPairChunk; }
  constexpr int SignsOfRows() const { return (Steps() + 3) / 4 * 32; }  // words of 16 rows: one a lane for four steps
  constexpr int BarriersAt() const { return SignsAt() + 4 * Steps() * SignsOfRows(); }
  constexpr int Barriers() const { return 2 * parts + kPairBringers * Ahead() + 1; }
  constexpr int Bytes() const { return BarriersAt() + 8 * Barriers(); }
};

}  // namespace jax_hadacore::cuda
