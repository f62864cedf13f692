// butterflies.h: the fast Walsh-Hadamard transform of rows of 2^m elements in vector registers.
//
// A row is transformed by butterflies of stride h = 1, 2, 4, ... n/2, always in this order, so that a row's sums are
// the same tree whatever the batch, the vector width or the blocking: results are bit-identical everywhere.
//   Group: the strides inside kGroup consecutive elements (kRegisters vectors), without touching memory in between.
//   Pass:  up to three more strides at once, over 2, 4 or 8 equal parts of a block.
// Block() nests them depth first, so every block is finished while it is in the nearest cache that holds it.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "vectors.h"

namespace jax_hadacore::cpu {
namespace {

constexpr int kRegisters = 8;
template <typename A>
constexpr int kGroup = kRegisters * kLanes<A>;

constexpr int Log2(int64_t n) {
  int bits = 0;
  while (n > 1) n /= 2, ++bits;
  return bits;
}

// a + s * b for s of +-1: the product is exact, so a fused multiply-add rounds as an addition does.
#if defined(__AVX512F__)
inline Lanes<float> AddSigned(const Lanes<float>& a, const Lanes<float>& s, const Lanes<float>& b) {
  return BitCast<Lanes<float>>(_mm512_fmadd_ps(BitCast<__m512>(s), BitCast<__m512>(b), BitCast<__m512>(a)));
}
inline Lanes<double> AddSigned(const Lanes<double>& a, const Lanes<double>& s, const Lanes<double>& b) {
  return BitCast<Lanes<double>>(_mm512_fmadd_pd(BitCast<__m512d>(s), BitCast<__m512d>(b), BitCast<__m512d>(a)));
}
#elif defined(__FMA__)
inline Lanes<float> AddSigned(const Lanes<float>& a, const Lanes<float>& s, const Lanes<float>& b) {
  return BitCast<Lanes<float>>(_mm256_fmadd_ps(BitCast<__m256>(s), BitCast<__m256>(b), BitCast<__m256>(a)));
}
inline Lanes<double> AddSigned(const Lanes<double>& a, const Lanes<double>& s, const Lanes<double>& b) {
  return BitCast<Lanes<double>>(_mm256_fmadd_pd(BitCast<__m256d>(s), BitCast<__m256d>(b), BitCast<__m256d>(a)));
}
#elif defined(__aarch64__)
inline Lanes<float> AddSigned(const Lanes<float>& a, const Lanes<float>& s, const Lanes<float>& b) {
  return BitCast<Lanes<float>>(vfmaq_f32(BitCast<float32x4_t>(a), BitCast<float32x4_t>(s), BitCast<float32x4_t>(b)));
}
inline Lanes<double> AddSigned(const Lanes<double>& a, const Lanes<double>& s, const Lanes<double>& b) {
  return BitCast<Lanes<double>>(vfmaq_f64(BitCast<float64x2_t>(a), BitCast<float64x2_t>(s), BitCast<float64x2_t>(b)));
}
#else
template <typename V>
V AddSigned(const V& a, const V& s, const V& b) {
  return a + s * b;
}
#endif

// The butterflies of stride h inside one vector: lane i becomes v[i] + v[i + h], lane i + h becomes v[i] - v[i + h].
template <typename A, int h, int... i>
Lanes<A> LaneButterfly(const Lanes<A>& v, std::integer_sequence<int, i...>) {
  constexpr Lanes<A> kSigns = {((i & h) ? A{-1} : A{1})...};
  return AddSigned(__builtin_shufflevector(v, v, (i ^ h)...), kSigns, v);
}

// The lowest kBits strides inside each of kCount vectors, stride by stride: the vectors' chains of dependent operations
// then overlap.
template <typename A, int kBits, int h = 1, int kCount>
void LaneButterflies(Lanes<A> (&v)[kCount]) {
  if constexpr (kBits > 0 && h < kLanes<A>) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) v[i] = LaneButterfly<A, h>(v[i], std::make_integer_sequence<int, kLanes<A>>{});
    LaneButterflies<A, kBits - 1, 2 * h>(v);
  }
}

// The strides kFrom, 2 kFrom, ... below kTo, counted in vectors, among kCount vectors.
template <int kFrom, int kTo, int kCount, typename V>
void VectorButterflies(V (&v)[kCount]) {
#pragma GCC unroll 3
  for (int h = kFrom; h < kTo; h *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
      if (!(i & h)) {
        const V a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
}

constexpr int Clamp(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

// The lowest kBits strides of kGroup consecutive elements: 2^(log2(kGroup) - kBits) short rows, or a part of one row.
template <typename T, int kBits, typename Sink>
__attribute__((always_inline)) inline void Group(const typename T::Storage* x, Sink sink) {
  using A = typename T::Accumulator;
  // Of the strides, those below the lanes are among vectors where elements come in pairs, the rest above the lanes.
  constexpr int kBelow = Clamp(kBits, 0, T::kPairs), kInside = Clamp(kBits - kBelow, 0, Log2(kLanes<A>));
  constexpr int kAbove = kBits - kBelow - kInside, kStep = 1 << T::kPairs;
  Lanes<A> v[kRegisters];
#pragma GCC unroll 8
  for (int i = 0; i < kRegisters; i += kStep) {
    if constexpr (T::kPairs) {
      T::LoadPair(x + i * kLanes<A>, v[i], v[i + 1]);
    } else {
      v[i] = T::Load(x + i * kLanes<A>);
    }
  }
  VectorButterflies<1, 1 << kBelow>(v);
  LaneButterflies<A, kInside>(v);
  VectorButterflies<kStep, kStep << kAbove>(v);
#pragma GCC unroll 8
  for (int i = 0; i < kRegisters; ++i) {
    if constexpr (!Sink::kPairs) {
      sink.Store(i * kLanes<A>, v[i]);
    } else if (i % 2 == 0) {
      sink.StorePair(i * kLanes<A>, v[i], v[i + 1]);
    }
  }
}

// Brings the memory of a group of results close. The last pass stores into several places in turn, which the processor
// fetches late; while the groups are read, memory has time.
template <typename T>
void PrefetchGroup(const typename T::Storage* result) {
  constexpr int64_t kCacheLine = 64 / sizeof(typename T::Storage);
  for (int64_t i = 0; i < kGroup<typename T::Accumulator>; i += kCacheLine) __builtin_prefetch(result + i, 1);
}

// The strides h, 2 h, ... of one vector in each of kRadix places.
template <int kRadix, typename A>
__attribute__((always_inline)) inline void Join(const A* from, int64_t h, Lanes<A> (&v)[kRadix]) {
#pragma GCC unroll 8
  for (int i = 0; i < kRadix; ++i) v[i] = Native<A>::Load(from + i * h);
  VectorButterflies<1, kRadix>(v);
}

// The strides h, 2 h, ... of kRadix parts of h accumulators each, in the parts' first `columns` columns.
template <int kRadix, typename A, typename Sink>
void Pass(const A* buffer, int64_t h, int64_t columns, Sink sink) {
  for (int64_t j = 0; j < columns; j += kLanes<A> << Sink::kPairs) {
    Lanes<A> v[kRadix];
    Join(buffer + j, h, v);
    if constexpr (Sink::kPairs) {
      Lanes<A> odd[kRadix];
      Join(buffer + j + kLanes<A>, h, odd);
#pragma GCC unroll 8
      for (int i = 0; i < kRadix; ++i) sink.StorePair(i * h + j, v[i], odd[i]);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kRadix; ++i) sink.Store(i * h + j, v[i]);
    }
  }
}

// How many parts the last pass over kGroup * 2^bits elements joins.
constexpr int LastRadix(int bits) { return bits == 4 ? 4 : bits >= 3 ? 8 : 1 << bits; }

// A block of n >= kGroup elements, its intermediate results in `buffer` (n accumulators). What `sink` stores goes to
// `result` in the end.
template <typename T, typename Sink>
void Block(const typename T::Storage* x, typename T::Accumulator* buffer, const typename T::Storage* result, int64_t n,
           Sink sink) {
  using A = typename T::Accumulator;
  const int bits = Log2(n / kGroup<A>);
  if (bits == 0) {
    if constexpr (!kInPlace<T>) PrefetchGroup<T>(result);
    return Group<T, Log2(kGroup<A>)>(x, sink);
  }
  const int radix = LastRadix(bits);
  const int64_t part = n / radix;
  for (int64_t at = 0; at < n; at += part) Block<T>(x + at, buffer + at, result + at, part, Unscaled<A>{buffer + at});
  switch (radix) {
    case 2: return Pass<2>(buffer, part, part, sink);
    case 4: return Pass<4>(buffer, part, part, sink);
    default: return Pass<8>(buffer, part, part, sink);
  }
}

// `count` consecutive elements that are rows of 2^kBits <= kGroup elements.
template <typename T, int kBits, typename Sink>
void ShortRows(const typename T::Storage* x, int64_t count, Sink sink) {
  constexpr int64_t kCount = kGroup<typename T::Accumulator>;
  int64_t at = 0;
  for (; at + kCount <= count; at += kCount) Group<T, kBits>(x + at, sink + at);
  if (at == count) return;
  typename T::Storage from[kCount] = {};
  typename Sink::Element to[kCount];
  const size_t left = static_cast<size_t>(count - at);
  std::memcpy(from, x + at, left * sizeof *from);
  Group<T, kBits>(from, sink.At(to));
  std::memcpy(sink.to + at, to, left * sizeof *to);
}

template <typename T, typename Sink, int... kBits>
void ShortRows(int bits, const typename T::Storage* x, int64_t count, Sink sink, std::integer_sequence<int, kBits...>) {
  ((bits == kBits ? ShortRows<T, kBits>(x, count, sink) : void()), ...);
}

// `count` consecutive elements that are rows of n = 2^m. `buffer` holds the accumulators of one row; in the sink's own
// memory, those of each row where they end.
template <typename T, typename Sink>
void PowerOfTwoRows(const typename T::Storage* x, int64_t n, int64_t count, typename T::Accumulator* buffer,
                    const typename T::Storage* result, Sink sink) {
  using A = typename T::Accumulator;
  if (n < kGroup<A>) return ShortRows<T>(Log2(n), x, count, sink, std::make_integer_sequence<int, Log2(kGroup<A>)>{});
  for (int64_t at = 0; at < count; at += n) {
    if constexpr (std::is_same_v<typename Sink::Element, A>) buffer = sink.to + at;
    Block<T>(x + at, buffer, result + at, n, sink + at);
  }
}

}  // namespace
}  // namespace jax_hadacore::cpu
