// instructions.cc: what single instructions compute, written from PTX's documentation and from nothing in ffi/.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"
#include "ptx.cuh"
#include "warp.h"

namespace emulation {
namespace {

struct Format {
  int mantissa;  // stored bits
  int lowest;    // exponent of the smallest subnormal
  uint16_t infinity;
};
constexpr Format kFormats[] = {{10, -24, 0x7c00}, {7, -133, 0x7f80}};
const Format& FormatOf(Half type) { return kFormats[static_cast<int>(type)]; }

// cvt.rn: to nearest even, subnormals kept, every NaN becomes 0x7fff.
uint16_t Round(Half type, double v) {
  const Format& format = FormatOf(type);
  if (std::isnan(v)) return 0x7fff;
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (v == 0) return sign;
  if (std::isinf(v)) return sign | format.infinity;
  const int unit = std::max(std::ilogb(v) - format.mantissa, format.lowest);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(v), -unit)));
  // The exponent's field counts units, less one where the leading bit, which is not stored, carries into it.
  const int code = ((unit - format.lowest) << format.mantissa) + units;
  return sign | static_cast<uint16_t>(std::min(code, int{format.infinity}));
}

double Widen(Half type, uint32_t half) {
  const Format& format = FormatOf(type);
  const int magnitude = half & 0x7fff, field = magnitude >> format.mantissa, one = 1 << format.mantissa;
  double v;
  if (magnitude >= format.infinity) {
    v = magnitude == format.infinity ? HUGE_VAL : std::nan("");
  } else {
    v = std::ldexp(field ? magnitude % one + one : magnitude, format.lowest + (field ? field - 1 : 0));
  }
  return half & 0x8000 ? -v : v;
}

double Widen(Half type, uint32_t packed, int i) { return Widen(type, packed >> (16 * i) & 0xffff); }

// sum + a[0] b[0] + ... + a[15] b[15] as tensor cores do it, in the coarsest way that was measured on any: all terms
// cut off below the 24th bit of the largest, summed exactly, and the sum cut off to float32 (Fasi, Higham, Mikaitis and
// Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330).
float Dot(const double (&a)[16], const double (&b)[16], double sum) {
  double terms[17], largest = 0, plain = 0;
  for (int k = 0; k < 17; ++k) {
    terms[k] = k < 16 ? a[k] * b[k] : sum;
    largest = std::max(largest, std::fabs(terms[k]));
    plain += terms[k];
  }
  if (!std::isfinite(plain) || largest == 0) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::max(std::ilogb(largest) - 23, -149)), units_in_one = 1 / unit;
  int64_t units = 0;
  for (const double term : terms) units += static_cast<int64_t>(term * units_in_one);
  const double exact = static_cast<double>(units) * unit;
  const auto nearest = static_cast<float>(exact);
  return std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

// mma.sync.aligned.m16n8k16.row.col.f32.{f16,bf16}.{f16,bf16}.f32 of one lane.
struct Operands {
  Half type;
  float* d;           // d0 to d3
  const uint32_t* a;  // a0 and a1 in the first register, ...
  uint32_t b[2];
  float c[4];
};

// "Matrix Fragments for mma.m16n8k16 with floating point type".
void MultiplyMatrices(void* const (&arguments)[32]) {
  double a[16][16], b[8][16], c[16][8];  // b by columns
  const auto each_result = [&](auto visit) {
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, in_group = lane % 4;
      for (int i = 0; i < 4; ++i)
        visit(*static_cast<Operands*>(arguments[lane]), i, i < 2 ? group : group + 8, in_group * 2 + (i & 1));
    }
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *static_cast<const Operands*>(arguments[lane]);
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
      const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      a[row][column] = Widen(operands.type, operands.a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      b[group][row] = Widen(operands.type, operands.b[i / 2], i % 2);
    }
  }
  each_result([&](const Operands& lane, int i, int row, int column) { c[row][column] = lane.c[i]; });
  each_result([&](Operands& lane, int i, int row, int column) { lane.d[i] = Dot(a[row], b[column], c[row][column]); });
}

// What one warp computes of wgmma.mma_async.sync.aligned.m64nNk16, of one lane; b is half a row.
struct WideOperands {
  Half type;
  float* d;
  int groups;  // of 8 columns
  const uint32_t* a;
  const uint16_t* b;
  bool add;
};

// "Register Fragments for wgmma.mma_async.m64nNk16": a warp's rows are as those of mma.m16n8k16, and so are the sums of
// each 8 columns.
void MultiplyWideMatrices(void* const (&arguments)[32]) {
  const auto lane_of = [&](int lane) -> WideOperands& { return *static_cast<WideOperands*>(arguments[lane]); };
  double a[16][16], b[256][16];  // b by columns
  const int groups = lane_of(0).groups;
  for (int lane = 0; lane < 32; ++lane) {
    const WideOperands& operands = lane_of(lane);
    for (int i = 0; i < 8; ++i)
      a[lane / 4 + (i / 2 % 2 ? 8 : 0)][lane % 4 * 2 + i % 2 + (i < 4 ? 0 : 8)] =
          Widen(operands.type, operands.a[i / 2], i % 2);
    for (int i = 0; i < 4 * groups; ++i) b[lane % 2 * 4 * groups + i][lane / 2] = Widen(operands.type, operands.b[i]);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int group = 0; group < groups; ++group)
      for (int i = 0; i < 4; ++i) {
        float& sum = lane_of(lane).d[4 * group + i];
        sum = Dot(a[lane / 4 + i / 2 * 8], b[8 * group + lane % 4 * 2 + i % 2], lane_of(lane).add ? sum : 0);
      }
}

// ldmatrix.sync.aligned.m8n8.x4.trans of one lane.
struct Matrices {
  uint32_t* d;
  const uint16_t* row;
};

// "Warp-level matrix load instruction: ldmatrix": register m is of matrix m, whose rows come from threads 8 m to 8 m
// + 7.
void Transpose(void* const (&arguments)[32]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) {
      const auto element = [&](int row, int column) {
        return static_cast<uint32_t>(static_cast<const Matrices*>(arguments[8 * m + row])->row[column]);
      };
      const int row = lane % 4 * 2, column = lane >> 2;
      static_cast<const Matrices*>(arguments[lane])->d[m] = element(row, column) | element(row + 1, column) << 16;
    }
}

// The same without .trans.
void Read(void* const (&arguments)[32]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) {
      const uint16_t* const row = static_cast<const Matrices*>(arguments[8 * m + lane / 4])->row + lane % 4 * 2;
      static_cast<const Matrices*>(arguments[lane])->d[m] = row[0] | static_cast<uint32_t>(row[1]) << 16;
    }
}

// stmatrix.sync.aligned.m8n8.x4.trans of one lane, which names the place of a column: "Warp-level matrix store
// instruction: stmatrix".
struct Columns {
  uint16_t* column;
  const uint32_t* v;
};

void Write(void* const (&arguments)[32]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 2; ++i)
        static_cast<const Columns*>(arguments[8 * m + lane % 4 * 2 + i])->column[lane / 4] =
            static_cast<uint16_t>(static_cast<const Columns*>(arguments[lane])->v[m] >> 16 * i);
}

constexpr Collective kTranspose = {"ldmatrix", Transpose};
constexpr Collective kRead = {"ldmatrix without transposition", Read}, kWrite = {"stmatrix", Write};
constexpr Collective kMultiplyWide[] = {{"wgmma f16", MultiplyWideMatrices}, {"wgmma bf16", MultiplyWideMatrices}};
constexpr Collective kMultiplyMatrices[] = {{"mma f16", MultiplyMatrices}, {"mma bf16", MultiplyMatrices}};

}  // namespace

// cvt.rni.s32.f32 and cvt.pack.sat.s8.s32, of one number.
uint32_t ConvertToInt8(float v) {
  if (std::isnan(v)) return 0;
  const double limited = std::min(std::max<double>(v, -128), 127.0);
  return static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(limited)));
}

// cvt.rn.satfinite.{e4m3x2,e5m2x2}.f32, of one number: the nearest of all, of two the one with an even code; every NaN
// becomes 0x7f.
uint32_t Convert(Float8 type, float v) {
  if (std::isnan(v)) return 0x7f;
  const int mantissa = type == Float8::kE4M3 ? 3 : 2, bias = type == Float8::kE4M3 ? 7 : 15;
  const int largest = type == Float8::kE4M3 ? 0x7e : 0x7b;
  const auto value = [&](int code) {
    const int field = code >> mantissa, rest = code % (1 << mantissa);
    return std::ldexp(field ? rest + (1 << mantissa) : rest, std::max(field, 1) - bias - mantissa);
  };
  const double magnitude = std::fabs(v);
  int best = 0;
  for (int code = 1; code <= largest; ++code) {
    const double distance = std::fabs(value(code) - magnitude), least = std::fabs(value(best) - magnitude);
    if (distance < least || (distance == least && code % 2 == 0)) best = code;
  }
  if (magnitude > value(largest)) best = largest;
  return static_cast<uint32_t>(best) | (std::signbit(v) ? 0x80 : 0);
}

uint32_t Pack(Half type, float low, float high) {
  return Round(type, low) | static_cast<uint32_t>(Round(type, high)) << 16;
}

float Unpack(Half type, uint32_t packed, int i) { return static_cast<float>(Widen(type, packed, i)); }

void ExchangeMatrices(uint32_t (&d)[4], const uint16_t (&row)[8]) {
  Matrices matrices = {d, row};
  Meet(kTranspose, &matrices);
}

void ReadMatrices(uint32_t (&d)[4], const uint16_t (&row)[8]) {
  Matrices matrices = {d, row};
  Meet(kRead, &matrices);
}

void WriteMatrices(uint16_t (&column)[8], const uint32_t (&v)[4]) {
  Columns columns = {column, v};
  Meet(kWrite, &columns);
}

void MatrixMultiplyAdd(Half type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       const float (&c)[4]) {
  Operands operands = {type, d, a, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  Meet(kMultiplyMatrices[static_cast<int>(type)], &operands);
}

void MultiplyColumns(Half type, float* d, int groups, const uint32_t (&a)[4], const uint16_t* b, bool add) {
  WideOperands operands = {type, d, groups, a, b, add};
  Meet(kMultiplyWide[static_cast<int>(type)], &operands);
}

}  // namespace emulation

namespace {

void CheckMask(unsigned mask) {
  if (mask != 0xffffffffu) emulation::Fail("a collective of a part of a warp");
}

struct Shuffle {
  int lane_mask;
  uint32_t value, result;
};

void ShuffleXor(void* const (&arguments)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& own = *static_cast<Shuffle*>(arguments[lane]);
    own.result = static_cast<const Shuffle*>(arguments[(lane ^ own.lane_mask) % 32])->value;
  }
}

struct Vote {
  int predicate;
  unsigned result;
};

void Ballot(void* const (&arguments)[32]) {
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (static_cast<const Vote*>(arguments[lane])->predicate) lanes |= 1u << lane;
  for (void* argument : arguments) static_cast<Vote*>(argument)->result = lanes;
}

struct Maximum {
  unsigned value, result;
};

void FindMaximum(void* const (&arguments)[32]) {
  unsigned most = 0;
  for (void* argument : arguments) most = std::max(most, static_cast<const Maximum*>(argument)->value);
  for (void* argument : arguments) static_cast<Maximum*>(argument)->result = most;
}

constexpr emulation::Collective kShuffleXor = {"shfl.xor", ShuffleXor}, kAny = {"vote.any", Ballot},
                                kBallot = {"vote.ballot", Ballot}, kMaximum = {"redux.max", FindMaximum};

}  // namespace

uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int lane_mask) {
  CheckMask(mask);
  Shuffle shuffle = {lane_mask, value, 0};
  emulation::Meet(kShuffleXor, &shuffle);
  return shuffle.result;
}

unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  CheckMask(mask);
  Maximum maximum = {value, 0};
  emulation::Meet(kMaximum, &maximum);
  return maximum.result;
}

int __any_sync(unsigned mask, int predicate) {
  CheckMask(mask);
  Vote vote = {predicate, 0};
  emulation::Meet(kAny, &vote);
  return vote.result != 0;
}

unsigned __ballot_sync(unsigned mask, int predicate) {
  CheckMask(mask);
  Vote vote = {predicate, 0};
  emulation::Meet(kBallot, &vote);
  return vote.result;
}
