// layout.h: where the elements of a fragment are while the tensor cores transform it, as functions that the compiler
// evaluates, and the proof that the two steps return every element to its place. Plain C++.
//
// A fragment is 256 consecutive elements of a row, 8 a lane: element e is in lane e / 8, slot e % 8, two slots to a
// 32-bit register. Operand shapes are those of PTX's mma.m16n8k16 ("Matrix fragments for mma.m16n8k16").
#pragma once

namespace jax_hadacore::cuda {

constexpr int kFragment = 256;  // elements
constexpr int kSlots = 8;       // elements a lane holds

// Operand B: a lane's register r (0 or 1), half h, is B[BRow][BColumn].
constexpr int BRow(int lane, int r, int h) { return lane % 4 * 2 + h + 8 * r; }
constexpr int BColumn(int lane) { return lane / 4; }
// The result: a lane's sum c (0 to 3) is C[CRow][CColumn].
constexpr int CRow(int lane, int c) { return lane / 4 + c / 2 * 8; }
constexpr int CColumn(int lane, int c) { return lane % 4 * 2 + c % 2; }
// Operand A: a lane's register r (0 to 3), half h, is A[ARow][AColumn].
constexpr int ARow(int lane, int r) { return lane / 4 + r % 2 * 8; }
constexpr int AColumn(int lane, int r, int h) { return lane % 4 * 2 + h + r / 2 * 8; }

// A place among a warp's values: of two products (or operands) `index`, a lane, and one of four values.
struct Place {
  int index, lane, value;
};

// Step 1 takes the registers as they were loaded: product `index` has operand registers 2 * index and 2 * index + 1.
constexpr Place OperandOfStep1(int element) { return {element % 8 / 4, element / 8, element % 4}; }
// Step 2's product `index` takes sums 2 * index and 2 * index + 1 of both products of step 1.
constexpr Place OperandOfStep2(Place sum) { return {sum.value / 2, sum.lane, sum.index * 2 + sum.value % 2}; }
// The slot that holds a sum of step 2 at the end.
constexpr int Slot(int index, int c) { return c / 2 * 4 + index * 2 + c % 2; }

constexpr int KIndex(Place operand) { return BRow(operand.lane, operand.value / 2, operand.value % 2); }

// The place of the sum whose row is the operand's k index: where a step leaves the element, transformed or not.
constexpr Place AfterStep(Place operand) {
  const int row = KIndex(operand), column = BColumn(operand.lane);
  return {operand.index, row % 8 * 4 + column / 2, row / 8 * 2 + column % 2};
}
constexpr Place Step1(int element) { return AfterStep(OperandOfStep1(element)); }
constexpr Place Step2(int element) { return AfterStep(OperandOfStep2(Step1(element))); }

// The k bits of a step (1 or 2) that carry the lowest `bits` bits of the element's index: those that it transforms.
constexpr int TransformedBits(int step, int bits) {
  int mask = 0;
  for (int bit = 0; bit < bits && bit < 8; ++bit)
    mask |= step == 1 ? KIndex(OperandOfStep1(1 << bit)) : KIndex(OperandOfStep2(Step1(1 << bit)));
  return mask;
}

constexpr int Parity(unsigned bits) {
  int parity = 0;
  for (; bits; bits &= bits - 1) parity ^= 1;
  return parity;
}

// Entry (row, column) of a step's 16x16 matrix: Hadamard on the bits in `mask`, identity on the others.
constexpr int Sign(int row, int column, int mask) {
  if ((row ^ column) & ~mask) return 0;
  return Parity(static_cast<unsigned>(row & column & mask)) ? -1 : 1;
}

// The lanes, as bits, whose half h of operand A's register 0, an entry of a step's matrix, is `value`.
constexpr unsigned LanesOf(int value, int h, int mask) {
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (Sign(ARow(lane, 0), AColumn(lane, 0, h), mask) == value) lanes |= 1u << lane;
  return lanes;
}

namespace proof {

constexpr bool AfterStepIsAResult() {
  for (int index = 0; index < 2; ++index)
    for (int lane = 0; lane < 32; ++lane)
      for (int value = 0; value < 4; ++value) {
        const Place operand = {index, lane, value}, sum = AfterStep(operand);
        if (CRow(sum.lane, sum.value) != KIndex(operand) || CColumn(sum.lane, sum.value) != BColumn(lane)) return false;
      }
  return true;
}
static_assert(AfterStepIsAResult(), "AfterStep is the place in C with the operand's k as its row");

constexpr bool ElementsReturn() {
  for (int element = 0; element < kFragment; ++element) {
    const Place end = Step2(element);
    if (end.lane * kSlots + Slot(end.index, end.value) != element) return false;
  }
  return true;
}
static_assert(ElementsReturn(), "after two steps every element is in the lane and slot it was loaded into");

// Each index bit is a k bit of exactly one step, so the two together transform all eight, and any lower part of them.
constexpr bool EveryBitOnce() {
  for (int bit = 0; bit < 8; ++bit) {
    const int one = TransformedBits(1, bit + 1) & ~TransformedBits(1, bit);
    const int two = TransformedBits(2, bit + 1) & ~TransformedBits(2, bit);
    const int all = one | two;
    if (all == 0 || (one && two) || (all & (all - 1))) return false;
  }
  return TransformedBits(1, 8) == 15 && TransformedBits(2, 8) == 15;
}
static_assert(EveryBitOnce(), "every bit of the index is transformed by one step");

// The 8x8 quarters of a step's matrix: with the highest bit transformed Q Q / Q -Q, without it Q 0 / 0 Q.
constexpr bool SignQuarters(int mask) {
  for (int row = 0; row < 8; ++row)
    for (int column = 0; column < 8; ++column) {
      const int q = Sign(row, column, mask), beside = mask & 8 ? q : 0, last = mask & 8 ? -q : q;
      if (Sign(row, column + 8, mask) != beside || Sign(row + 8, column, mask) != beside) return false;
      if (Sign(row + 8, column + 8, mask) != last) return false;
    }
  return true;
}
constexpr bool SignQuarters() {
  for (int mask = 0; mask < 16; ++mask)
    if (!SignQuarters(mask)) return false;
  return true;
}
static_assert(SignQuarters(), "one quarter of a sign matrix determines it");

constexpr bool SquareIs16() {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      int sum = 0;
      for (int k = 0; k < 16; ++k) sum += Sign(i, k, 15) * Sign(k, j, 15);
      if (sum != (i == j ? 16 : 0)) return false;
    }
  return true;
}
static_assert(SquareIs16(), "H H^T = 16 I");

}  // namespace proof
}  // namespace jax_hadacore::cuda
