// factors.h: the product with a matrix whose order is no power of two, down the columns of arrays (factor_sums.h
// has the plan).
#pragma once

#include <cstdint>
#include <utility>

#include "factor_sums.h"
#include "hadamard.h"
#include "vectors.h"

namespace jax_hadacore::cpu {
namespace {

template <typename A>
constexpr int kStrip = static_cast<int>(kStripBytes / sizeof(A));

template <typename A>
struct Strip {
  static constexpr int kVectors = static_cast<int>(kStripBytes) / kVectorBytes;
  Lanes<A> v[kVectors];

  static Strip Load(const A* from) {
    Strip s;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) s.v[i] = Native<A>::Load(from + i * kLanes<A>);
    return s;
  }
  template <typename Sink>
  void Store(Sink sink) const {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sink.Store(i * kLanes<A>, v[i]);
  }
  void Store(A* to) const { Store(Unscaled<A>{to}); }
  Strip operator+(const Strip& other) const {
    Strip s;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) s.v[i] = v[i] + other.v[i];
    return s;
  }
  Strip operator*(A factor) const {
    Strip s;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) s.v[i] = v[i] * factor;
    return s;
  }
  Strip operator-() const {
    Strip s;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) s.v[i] = -v[i];
    return s;
  }
};

// At most kStrip consecutive columns, counted over arrays of (order, inner) elements that follow each other.
template <typename A>
class Columns {
 public:
  Columns(int64_t order, int64_t inner, int64_t first, int64_t count) : inner_(inner), count_(count) {
    int64_t column = first % inner, at = (first - column) * order + column;
    adjacent_ = count == kStrip<A> && column + count <= inner;
    at_[0] = at;
    if (adjacent_) return;
    for (int i = 1; i < kStrip<A>; ++i) {
      ++at;
      if (++column == inner) column = 0, at += (order - 1) * inner;
      at_[i] = i < count ? at : at_[0];
    }
  }

  Strip<A> Load(const A* from, int64_t row) const {
    from += row * inner_;
    if (adjacent_) return Strip<A>::Load(from + at_[0]);
    A lanes[kStrip<A>];
    for (int i = 0; i < kStrip<A>; ++i) lanes[i] = from[at_[i]];
    return Strip<A>::Load(lanes);
  }

  template <typename Sink>
  void Store(const Strip<A>& strip, int64_t row, Sink sink) const {
    sink = sink + row * inner_;
    if (adjacent_) return strip.Store(sink + at_[0]);
    typename Sink::Element lanes[kStrip<A>];
    strip.Store(sink.At(lanes));
    for (int i = 0; i < count_; ++i) sink.to[at_[i]] = lanes[i];
  }

 private:
  int64_t inner_, count_;
  bool adjacent_;
  int64_t at_[kStrip<A>];
};

// term(kFirst) + ... of kCount terms.
template <int kFirst, int kCount, typename Term>
__attribute__((always_inline)) inline auto Pairwise(const Term& term) {
  if constexpr (kCount == 1) {
    return term(kFirst);
  } else {
    return Pairwise<kFirst, kCount / 2>(term) + Pairwise<kFirst + kCount / 2, kCount - kCount / 2>(term);
  }
}

template <typename A>
class FactorStep {
 public:
  FactorStep(const Problem& problem, int factor, const Memory& memory)
      : factor_(problem.factors[factor]),
        fours_((factor_.order + 3) / 4),
        picks_(memory.picks[factor]),
        table_(static_cast<A*>(memory.table)),
        sums_(static_cast<A*>(memory.sums)) {}

  // Of arrays of (order, inner) elements at z, the columns of a range that counts over all of them; z may be where the
  // results go.
  template <typename Sink>
  void Apply(const A* z, int64_t inner, Range range, Sink sink) const {
    for (int64_t first = range.first; first < range.last; first += kStrip<A>) {
      const int64_t left = range.last - first;
      const Columns<A> columns(factor_.order, inner, first, left < kStrip<A> ? left : kStrip<A>);
      for (int64_t four = 0; four < fours_; four += kBlock) {
        const int count = static_cast<int>(fours_ - four < kBlock ? fours_ - four : kBlock);
        MakeTable(columns, z, four, count);
        AddBlock(four, count, std::make_integer_sequence<int, kBlock>{});
      }
      for (int64_t row = 0; row < factor_.order; ++row) {
        Strip<A> sum = Strip<A>::Load(Sum(0, row));
        for (int64_t four = kFoursPerSum; four < fours_; four += kFoursPerSum)
          sum = sum + Strip<A>::Load(Sum(four, row));
        columns.Store(sum, row, sink);
      }
    }
  }

 private:
  // Of the i-th four inputs of a block, the 16 signed sums, or the inputs.
  A* Table(int i) const { return table_ + i * (kFourBytes / static_cast<int64_t>(sizeof(A))); }
  // A result's sum over the blocks that are added to that of `four`.
  A* Sum(int64_t four, int64_t row) const { return sums_ + (four / kFoursPerSum * factor_.order + row) * kStrip<A>; }

  void MakeTable(const Columns<A>& columns, const A* z, int64_t first, int count) const {
    for (int i = 0; i < count; ++i) {
      Strip<A> x[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t row = (first + i) * 4 + j;
        x[j] = row < factor_.order ? columns.Load(z, row) : Strip<A>{};
      }
      A* to = Table(i);
      if (!picks_) {
        for (int j = 0; j < 4; ++j) x[j].Store(to + j * kStrip<A>);
        continue;
      }
      // In the order that MakePicks counts on.
      const Strip<A> even[4] = {x[0] + x[2], x[2] + -x[0], x[0] + -x[2], -x[0] + -x[2]};
      const Strip<A> odd[4] = {x[1] + x[3], x[3] + -x[1], x[1] + -x[3], -x[1] + -x[3]};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) (even[k] + odd[j]).Store(to + (4 * j + k) * kStrip<A>);
    }
  }

  template <int... kLess>
  void AddBlock(int64_t first, int count, std::integer_sequence<int, kLess...>) const {
    ((count == kLess + 1 ? AddBlock<kLess + 1>(first) : void()), ...);
  }

  template <int kCount>
  void AddBlock(int64_t first) const {
    if (picks_) {
      const uint16_t* picks = picks_ + first * factor_.order;
      const char* table = reinterpret_cast<const char*>(table_);
      AddSums<kCount>(first, [table, picks](int64_t row, int i) __attribute__((always_inline)) {
        return Strip<A>::Load(reinterpret_cast<const A*>(table + picks[row * kBlock + i]));
      });
    } else {
      AddSums<kCount>(first, [this, first](int64_t row, int i) { return Product(row, first + i, Table(i)); });
    }
  }

  template <int kCount, typename Four>
  void AddSums(int64_t first, Four four) const {
    for (int64_t row = 0; row < factor_.order; ++row) {
      Strip<A> sum = Pairwise<0, kCount>([&](int i) __attribute__((always_inline)) { return four(row, i); });
      A* to = Sum(first, row);
      if (first % kFoursPerSum) sum = Strip<A>::Load(to) + sum;
      sum.Store(to);
    }
  }

  __attribute__((noinline)) Strip<A> Product(int64_t row, int64_t four, const A* x) const {
    const double* values = factor_.values + row * factor_.order + four * 4;
    Strip<A> sum = Strip<A>::Load(x) * static_cast<A>(values[0]);
    for (int64_t j = 1; j < 4 && four * 4 + j < factor_.order; ++j)
      sum = sum + Strip<A>::Load(x + j * kStrip<A>) * static_cast<A>(values[j]);
    return sum;
  }

  const Factor factor_;
  const int64_t fours_;
  const uint16_t* const picks_;
  A* const table_;
  A* const sums_;
};

}  // namespace
}  // namespace jax_hadacore::cpu
