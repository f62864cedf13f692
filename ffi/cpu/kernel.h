// kernel.h: the fast Walsh-Hadamard transform in vector registers, for the instruction set that the including file is
// compiled for. Only isa_*.cc include it: everything is in an unnamed namespace, so that the linker cannot take one
// file's AVX-512 copy of a function for another's baseline copy.
//
// A row is transformed by butterflies of stride h = 1, 2, 4, ... n/2, always in this order, so that a row's sums are
// the same tree whatever the batch, the vector width or the blocking: results are bit-identical everywhere.
//   Group: the strides inside kGroup consecutive elements (kRegisters vectors), without touching memory in between.
//   Pass:  up to three more strides at once, over 2, 4 or 8 equal parts of a block.
// Row() nests them depth first, so every block is finished while it is in the nearest cache that holds it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "hadamard.h"

namespace jax_hadacore::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <typename A>
using Lanes = Vector<A, kLanes<A>>;
template <typename A>
using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

constexpr int kRegisters = 8;
template <typename A>
constexpr int kGroup = kRegisters * kLanes<A>;

constexpr int Log2(int64_t n) {
  int bits = 0;
  while (n > 1) n /= 2, ++bits;
  return bits;
}

template <typename To, typename From>
To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- Element types: what is stored, what it is accumulated in, and the conversions of one vector. ----

template <typename A>
struct Native {
  using Storage = A;
  using Accumulator = A;
  static constexpr bool kPairs = false;
  static Lanes<A> Load(const A* from) {
    Lanes<A> v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static void Store(A* to, const Lanes<A>& v) { std::memcpy(to, &v, sizeof v); }
};

constexpr int kFloatLanes = kLanes<float>;
using Words = Vector<uint32_t, kFloatLanes>;
using Halves = Vector<uint16_t, kFloatLanes>;

inline Halves LoadHalves(const uint16_t* from) {
  Halves v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Lane by lane: `yes` where the comparison `mask` holds (all ones), else `no`.
inline Words Select(const Words& mask, const Words& yes, const Words& no) { return (mask & yes) | (~mask & no); }

// Two vectors at a time, the even and the odd ones of consecutive elements: each is half of a 32-bit word, and stays
// where it is. The butterflies of stride 1 are then among vectors.
struct BFloat16 {
  using Storage = uint16_t;
  using Accumulator = float;
  static constexpr bool kPairs = true;
  static void LoadPair(const uint16_t* from, Lanes<float>& even, Lanes<float>& odd) {
    Words w;
    std::memcpy(&w, from, sizeof w);
    even = BitCast<Lanes<float>>(w << 16);
    odd = BitCast<Lanes<float>>(w & 0xffff0000);
  }
  static void StorePair(uint16_t* to, const Lanes<float>& even, const Lanes<float>& odd) {
    const Words w = Rounded(even) >> 16 | (Rounded(odd) & 0xffff0000);
    std::memcpy(to, &w, sizeof w);
  }

 private:
  // To nearest, ties to even, in the upper halves. A NaN is an operand's or the processor's own: its lower half is
  // zero, so it stays as it is.
  static Words Rounded(const Lanes<float>& v) {
    const Words u = BitCast<Words>(v);
    return u + (u >> 16 & 1) + 0x7fff;
  }
};

struct Float16 {
  using Storage = uint16_t;
  using Accumulator = float;
  static constexpr bool kPairs = false;
#if defined(__AVX512F__)
  static Lanes<float> Load(const uint16_t* from) {
    return BitCast<Lanes<float>>(_mm512_cvtph_ps(BitCast<__m256i>(LoadHalves(from))));
  }
  static void Store(uint16_t* to, const Lanes<float>& v) {
    const __m256i h = _mm512_cvtps_ph(BitCast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to, &h, sizeof h);
  }
#elif defined(__F16C__)
  static Lanes<float> Load(const uint16_t* from) {
    return BitCast<Lanes<float>>(_mm256_cvtph_ps(BitCast<__m128i>(LoadHalves(from))));
  }
  static void Store(uint16_t* to, const Lanes<float>& v) {
    __m128i h = _mm256_cvtps_ph(BitCast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    asm("" : "+x"(h));  // a conversion straight to memory takes twice as long on AMD's processors
    std::memcpy(to, &h, sizeof h);
  }
#elif defined(__aarch64__)
  static Lanes<float> Load(const uint16_t* from) {
    return BitCast<Lanes<float>>(vcvt_f32_f16(BitCast<float16x4_t>(LoadHalves(from))));
  }
  static void Store(uint16_t* to, const Lanes<float>& v) {
    const float16x4_t h = vcvt_f16_f32(BitCast<float32x4_t>(v));
    std::memcpy(to, &h, sizeof h);
  }
#else
  // Without conversion instructions: float16's bits are float32's, shifted, with an exponent 112 too small.
  static Lanes<float> Load(const uint16_t* from) {
    const Words h = __builtin_convertvector(LoadHalves(from), Words);
    const Lanes<float> magnitude = BitCast<Lanes<float>>((h & 0x7fff) << 13) * 0x1p112f;
    const Words special = BitCast<Words>((h & 0x7c00) == 0x7c00) & 0x7f800000;  // infinity and NaN
    return BitCast<Lanes<float>>(BitCast<Words>(magnitude) | special | (h & 0x8000) << 16);
  }
  static void Store(uint16_t* to, const Lanes<float>& v) {
    const Words u = BitCast<Words>(v), magnitude = u & 0x7fffffff;
    const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5, whose unit in the last place is float16's smallest subnormal, rounds a subnormal result.
    const Words small = BitCast<Words>(BitCast<Lanes<float>>(magnitude) + 0.5f) - 0x3f000000;
    Words result = Select(BitCast<Words>(magnitude < 0x38800000), small, normal);
    result = Select(BitCast<Words>(magnitude >= 0x477ff000), Words{} + 0x7c00, result);  // from 65520: infinity
    result = Select(BitCast<Words>(magnitude > 0x7f800000), Words{} + 0x7e00, result);
    const Halves h = __builtin_convertvector(result | (u >> 16 & 0x8000), Halves);
    std::memcpy(to, &h, sizeof h);
  }
#endif
};

// ---- Butterflies. ----

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

// Whether the result's memory holds the accumulators.
template <typename T>
constexpr bool kInPlace = std::is_same_v<typename T::Storage, typename T::Accumulator>;

// Where vectors go: as they are into a buffer of accumulators, or scaled into the result.
template <typename T>
struct Unscaled {
  using Accumulator = typename T::Accumulator;
  static constexpr bool kPairs = false;
  Accumulator* to;
  void Store(int64_t at, const Lanes<Accumulator>& v) const { Native<Accumulator>::Store(to + at, v); }
  Unscaled operator+(int64_t offset) const { return {to + offset}; }
};
template <typename T>
struct Scaled {
  using Accumulator = typename T::Accumulator;
  static constexpr bool kPairs = T::kPairs;
  typename T::Storage* to;
  Accumulator scale;
  void Store(int64_t at, const Lanes<Accumulator>& v) const { T::Store(to + at, v * scale); }
  void StorePair(int64_t at, const Lanes<Accumulator>& even, const Lanes<Accumulator>& odd) const {
    T::StorePair(to + at, even * scale, odd * scale);
  }
  Scaled operator+(int64_t offset) const { return {to + offset, scale}; }
};

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
  for (int64_t at = 0; at < n; at += part) Block<T>(x + at, buffer + at, result + at, part, Unscaled<T>{buffer + at});
  switch (radix) {
    case 2: return Pass<2>(buffer, part, part, sink);
    case 4: return Pass<4>(buffer, part, part, sink);
    default: return Pass<8>(buffer, part, part, sink);
  }
}

// `count` consecutive elements that are rows of 2^kBits <= kGroup elements.
template <typename T, int kBits>
void ShortRows(const typename T::Storage* x, int64_t count, Scaled<T> sink) {
  using S = typename T::Storage;
  constexpr int64_t kCount = kGroup<typename T::Accumulator>;
  int64_t at = 0;
  for (; at + kCount <= count; at += kCount) Group<T, kBits>(x + at, sink + at);
  if (at == count) return;
  S tail[kCount] = {};
  const size_t bytes = static_cast<size_t>(count - at) * sizeof(S);
  std::memcpy(tail, x + at, bytes);
  Group<T, kBits>(tail, Scaled<T>{tail, sink.scale});
  std::memcpy(sink.to + at, tail, bytes);
}

template <typename T, int... kBits>
void ShortRows(int bits, const typename T::Storage* x, int64_t count, Scaled<T> sink,
               std::integer_sequence<int, kBits...>) {
  ((bits == kBits ? ShortRows<T, kBits>(x, count, sink) : void()), ...);
}

// ---- The functions of an instruction set (hadamard.h), for one element type and for all. ----

template <typename T>
struct Kernel {
  using A = typename T::Accumulator;
  using S = typename T::Storage;

  static Scaled<T> Result(const Problem& problem, void* y) {
    return {static_cast<S*>(y), static_cast<A>(problem.scale)};
  }

  static void Rows(const Problem& problem, Range rows, const void* x_, void* y, void* buffer_) {
    const int64_t n = problem.n;
    const S* x = static_cast<const S*>(x_) + rows.first * n;
    const Scaled<T> result = Result(problem, y) + rows.first * n;
    const int64_t count = (rows.last - rows.first) * n;
    if (n < kGroup<A>)
      return ShortRows<T>(Log2(n), x, count, result, std::make_integer_sequence<int, Log2(kGroup<A>)>{});
    for (int64_t at = 0; at < count; at += n) {
      A* buffer = static_cast<A*>(buffer_);
      if constexpr (kInPlace<T>) buffer = result.to + at;
      Block<T>(x + at, buffer, result.to + at, n, result + at);
    }
  }

  static void Parts(int64_t length, Range parts, const void* x_, void* buffer_) {
    const S* x = static_cast<const S*>(x_);
    A* buffer = static_cast<A*>(buffer_);
    for (int64_t at = parts.first * length; at < parts.last * length; at += length)
      Block<T>(x + at, buffer + at, x + at, length, Unscaled<T>{buffer + at});  // the result is too far away in time
  }

  static void Columns(const Problem& problem, int64_t h, Range columns, void* buffer_, void* y) {
    A* buffer = static_cast<A*>(buffer_);
    while (columns.first < columns.last) {
      const int64_t column = columns.first % h, at = (columns.first - column) * kJoined + column;
      const int64_t left = columns.last - columns.first, count = h - column < left ? h - column : left;
      if (h * kJoined == problem.n) {
        Pass<kJoined>(buffer + at, h, count, Result(problem, y) + at);
      } else {
        Pass<kJoined>(buffer + at, h, count, Unscaled<T>{buffer + at});
      }
      columns.first += count;
    }
  }
};

// Calls function(Kernel<T>{}) for the element type T.
template <typename F>
void ForType(Dtype dtype, const F& function) {
  switch (dtype) {
    case Dtype::kF16: return function(Kernel<Float16>{});
    case Dtype::kBF16: return function(Kernel<BFloat16>{});
    case Dtype::kF32: return function(Kernel<Native<float>>{});
    case Dtype::kF64: return function(Kernel<Native<double>>{});
  }
}

constexpr Isa MakeIsa(const char* name) {
  return {name,
          [](const Problem& problem, Range rows, const void* x, void* y, void* buffer) {
            ForType(problem.dtype, [&](auto kernel) { kernel.Rows(problem, rows, x, y, buffer); });
          },
          [](const Problem& problem, int64_t length, Range parts, const void* x, void* buffer) {
            ForType(problem.dtype, [&](auto kernel) { kernel.Parts(length, parts, x, buffer); });
          },
          [](const Problem& problem, int64_t h, Range columns, void* buffer, void* y) {
            ForType(problem.dtype, [&](auto kernel) { kernel.Columns(problem, h, columns, buffer, y); });
          }};
}

}  // namespace
}  // namespace jax_hadacore::cpu
