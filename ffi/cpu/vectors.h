// vectors.h: vectors of elements for the instruction set that the including file is compiled for: their types, how they
// are loaded and where they go. Like all that kernel.h includes, in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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

 protected:
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

// BFloat16 by vectors of consecutive elements, for what is not done in pairs.
struct ConsecutiveBFloat16 : BFloat16 {
  static constexpr bool kPairs = false;
  static Lanes<float> Load(const uint16_t* from) {
    return BitCast<Lanes<float>>(__builtin_convertvector(LoadHalves(from), Words) << 16);
  }
  static void Store(uint16_t* to, const Lanes<float>& v) {
    const Halves h = __builtin_convertvector(Rounded(v) >> 16, Halves);
    std::memcpy(to, &h, sizeof h);
  }
};
template <typename T>
using Consecutive = std::conditional_t<T::kPairs, ConsecutiveBFloat16, T>;

// ---- Where vectors go. ----

// Whether the result's memory holds the accumulators.
template <typename T>
constexpr bool kInPlace = std::is_same_v<typename T::Storage, typename T::Accumulator>;

// As they are into a buffer of accumulators, or scaled into the result.
template <typename A>
struct Unscaled {
  using Element = A;
  static constexpr bool kPairs = false;
  A* to;
  void Store(int64_t at, const Lanes<A>& v) const { Native<A>::Store(to + at, v); }
  Unscaled At(A* other) const { return {other}; }
  Unscaled operator+(int64_t offset) const { return At(to + offset); }
};
template <typename T>
struct Scaled {
  using Accumulator = typename T::Accumulator;
  using Element = typename T::Storage;
  static constexpr bool kPairs = T::kPairs;
  Element* to;
  Accumulator scale;
  void Store(int64_t at, const Lanes<Accumulator>& v) const { T::Store(to + at, v * scale); }
  void StorePair(int64_t at, const Lanes<Accumulator>& even, const Lanes<Accumulator>& odd) const {
    T::StorePair(to + at, even * scale, odd * scale);
  }
  Scaled At(Element* other) const { return {other, scale}; }
  Scaled operator+(int64_t offset) const { return At(to + offset); }
};
// The same with the product in double: n**-0.5 may be far from any float.
template <typename T>
struct ScaledExactly {
  using Accumulator = typename T::Accumulator;
  using Element = typename T::Storage;
  static constexpr bool kPairs = false;
  Element* to;
  double scale;
  void Store(int64_t at, const Lanes<Accumulator>& v) const {
    using Doubles = Vector<double, kLanes<Accumulator>>;
    T::Store(to + at, __builtin_convertvector(__builtin_convertvector(v, Doubles) * scale, Lanes<Accumulator>));
  }
  ScaledExactly At(Element* other) const { return {other, scale}; }
  ScaledExactly operator+(int64_t offset) const { return At(to + offset); }
};

}  // namespace
}  // namespace jax_hadacore::cpu
