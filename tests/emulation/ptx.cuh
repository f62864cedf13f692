// ptx.cuh: takes the place of ffi/cuda/ptx.cuh, whose assembly is not for the host; instructions.cc computes the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulation {

enum class Half { kF16, kBF16 };
uint32_t Pack(Half type, float low, float high);
float Unpack(Half type, uint32_t packed, int i);
void ExchangeMatrices(uint32_t (&d)[4], const uint16_t (&row)[8]);
void ReadMatrices(uint32_t (&d)[4], const uint16_t (&row)[8]);
void WriteMatrices(uint16_t (&column)[8], const uint32_t (&v)[4]);
void MatrixMultiplyAdd(Half type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]);

// d: sums of 8 times `groups` columns, 4 a group; b: a lane's elements of a row of operand B, lane / 2, of which lanes
// with even numbers have the first half.
void MultiplyColumns(Half type, float* d, int groups, const uint32_t (&a)[4], const uint16_t* b, bool add);

void SyncWarp();
void MakeBarrier(const void* address, int arrivals);
void ArriveAt(const void* address);
void ArriveAndExpect(const void* address, int bytes);
void WaitAt(const void* address, int turn);

// What the words of a tensor map are here.
struct BoxedRows {
  const char* x;
  int64_t rows;
  int order, a, line, row, box;  // sizes in bytes of an a, a line and a row; a's in a box
};
void Bring(const void* barrier, int bytes);

uint32_t ConvertToInt8(float v);

enum class Float8 { kE4M3, kE5M2 };
uint32_t Convert(Float8 type, float v);

void WaitForPreviousLaunch();
void ArriveAtCluster();
void WaitForCluster();

// The running thread's copies that have begun: of one at a time, the oldest.
void StartCopy(void* to, const void* from);
bool NextCopy(void*& to, const void*& from);

}  // namespace emulation

namespace jax_hadacore::cuda {

struct F16 {};
struct BF16 {};

template <typename T>
constexpr emulation::Half kHalf = std::is_same_v<T, F16> ? emulation::Half::kF16 : emulation::Half::kBF16;

template <typename T>
uint32_t Pack(float low, float high) {
  return emulation::Pack(kHalf<T>, low, high);
}

template <typename T>
float2 Unpack(uint32_t packed) {
  return {emulation::Unpack(kHalf<T>, packed, 0), emulation::Unpack(kHalf<T>, packed, 1)};
}

inline float MaxOrNan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }
inline float ApproximateReciprocal(float v) { return std::nextafter(1 / v, 0.0f); }

inline uint32_t PackInt8(float low, float high, uint32_t rest = 0) {
  return emulation::ConvertToInt8(low) | emulation::ConvertToInt8(high) << 8 | rest << 16;
}
inline uint32_t ConvertToE4M3(float low, float high) {
  return emulation::Convert(emulation::Float8::kE4M3, low) | emulation::Convert(emulation::Float8::kE4M3, high) << 8;
}
inline uint32_t ConvertToE5M2(float low, float high) {
  return emulation::Convert(emulation::Float8::kE5M2, low) | emulation::Convert(emulation::Float8::kE5M2, high) << 8;
}

template <int kDimension>
uint32_t Opaque(uint32_t v) {
  return v;
}

inline const uint32_t* Generic(const uint32_t* parameter) { return parameter; }

template <typename T>
void KeepOutOfRegisters(T*&) {}
inline void KeepOutOfRegisters(int&) {}

inline void IssueLoads() {}
inline void Prefetch(const void*) {}

inline void WaitForPreviousLaunch() { emulation::WaitForPreviousLaunch(); }
inline void ArriveAtCluster() { emulation::ArriveAtCluster(); }
inline void WaitForCluster() { emulation::WaitForCluster(); }

// Copies are made as late as they may be, so that a use too early finds nothing.
template <int kOffset>
void StartCopy(void* shared, const void* global) {
  emulation::StartCopy(static_cast<char*>(shared) + kOffset, static_cast<const char*>(global) + kOffset);
}
inline void FinishCopies() {
  void* to;
  const void* from;
  while (emulation::NextCopy(to, from)) *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}

inline void StoreWords(void* to, uint32_t a, uint32_t b) { *static_cast<uint2*>(to) = make_uint2(a, b); }
inline void StoreWords(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *static_cast<uint4*>(to) = make_uint4(a, b, c, d);
}

using SharedAddress = const char*;
inline SharedAddress AddressOf(const void* shared) { return static_cast<SharedAddress>(shared); }

inline void LoadMatrices(uint32_t (&d)[4], SharedAddress row) {
  const uint4 v = *reinterpret_cast<const uint4*>(row);
  uint16_t elements[8];
  std::memcpy(elements, &v, sizeof v);
  emulation::ExchangeMatrices(d, elements);
}

inline void LoadLines(uint32_t (&d)[4], SharedAddress row) {
  const uint4 v = *reinterpret_cast<const uint4*>(row);
  uint16_t elements[8];
  std::memcpy(elements, &v, sizeof v);
  emulation::ReadMatrices(d, elements);
}
inline void StoreTransposed(SharedAddress column, const uint32_t (&v)[4]) {
  uint16_t elements[8];
  emulation::WriteMatrices(elements, v);
  uint4 line;
  std::memcpy(&line, elements, sizeof line);
  *reinterpret_cast<uint4*>(const_cast<char*>(column)) = line;
}

template <typename T>
void MatrixMultiplyAdd(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  emulation::MatrixMultiplyAdd(kHalf<T>, d, a, b0, b1, c);
}

inline void SyncWarp() { emulation::SyncWarp(); }
inline int UniformWarp() { return static_cast<int>(threadIdx.x) / 32; }

inline void MakeBarrier(SharedAddress barrier, int arrivals) { emulation::MakeBarrier(barrier, arrivals); }
inline void ArriveAt(SharedAddress barrier) { emulation::ArriveAt(barrier); }
inline void ArriveAndExpect(SharedAddress barrier, int bytes) { emulation::ArriveAndExpect(barrier, bytes); }
inline void WaitAt(SharedAddress barrier, int turn) { emulation::WaitAt(barrier, turn); }

// Lines are changed as those of SharedColumns.
inline void BringBox(SharedAddress to, const void* map, int a, int plane, int row, SharedAddress barrier) {
  emulation::BoxedRows rows;
  std::memcpy(&rows, map, sizeof rows);
  for (int i = 0; i < rows.box; ++i)
    for (int at = 0; at < rows.line; at += 16) {
      uint4 v = {0, 0, 0, 0};
      if (a + i < rows.order && row < rows.rows)
        v = *reinterpret_cast<const uint4*>(rows.x + static_cast<int64_t>(row) * rows.row + (a + i) * rows.a +
                                            plane * rows.line + at);
      auto address = reinterpret_cast<uintptr_t>(to + i * rows.line + at);
      *reinterpret_cast<uint4*>(address ^ (address >> 3 & (rows.line - 16))) = v;
    }
  emulation::Bring(barrier, rows.box * rows.line);
}

// These are made at once; a use before the barrier is a race.
inline void StartCopies(void* shared, const void* global, int bytes, SharedAddress barrier) {
  for (int i = 0; i < bytes / 16; ++i) static_cast<uint4*>(shared)[i] = static_cast<const uint4*>(global)[i];
  ArriveAt(barrier);
}

inline void ShowToProducts() {}
template <int kRegisters>
void TakeRegisters() {}
template <int kRegisters>
void GiveRegisters() {}

template <int kLine>
struct SharedColumns {
  SharedAddress first;
  int further;

  SharedColumns(SharedAddress first, int further) : first(first), further(further) {}
  SharedColumns Below(int rows) const { return {first + rows * kLine, further}; }
};

struct SharedMatrix {
  SharedAddress first;
  int rows, from;

  SharedMatrix(SharedAddress first, int rows, int from) : first(first), rows(rows), from(from) {}
  SharedMatrix Right(int columns) const { return {first + columns / 8 * rows * 16, rows, from}; }
};

// A product is computed at once, by each warp for itself. Of operand B a lane reads half a row: when one lane knows
// that products have been awaited, all have read.
inline void BeginProducts() {}
inline void CommitProduct() {}
template <int kLeft>
void AwaitProducts() {
  emulation::SyncWarp();
}
template <typename T, int kLine>
void StartProduct(float (&d)[16][4], const uint32_t (&a)[4], SharedColumns<kLine> b, bool add) {
  uint16_t half_row[64];
  for (int i = 0; i < 8; ++i) {
    const int at = threadIdx.x % 2 * 128 + 16 * i, row = static_cast<int>(threadIdx.x) % 32 / 2;
    // "Swizzling modes": of addresses, not of places in the matrix.
    auto address = reinterpret_cast<uintptr_t>(b.first + at / kLine * b.further + row * kLine + at % kLine);
    address ^= address >> 3 & (kLine - 16);
    const uint4 v = *reinterpret_cast<const uint4*>(address);
    std::memcpy(&half_row[8 * i], &v, sizeof v);
  }
  emulation::MultiplyColumns(kHalf<T>, d[0], 16, a, half_row, add);
}

struct SharedLines {
  SharedAddress first;
  int further;

  SharedLines(SharedAddress first, int further) : first(first), further(further) {}
  SharedLines Further(int bytes) const { return {first + bytes, further}; }
};

template <typename T, int kRows, int kSums>
void StartProduct(float (&d)[kRows][kSums], const uint32_t (&a)[4], SharedLines b, bool add) {
  constexpr int kHalfRow = kRows * kSums;
  const int row = static_cast<int>(threadIdx.x) % 32 / 2;
  uint16_t half_row[kHalfRow];
  for (int i = 0; i < kHalfRow; ++i) {
    const int column = static_cast<int>(threadIdx.x) % 2 * kHalfRow + i;
    half_row[i] = *reinterpret_cast<const uint16_t*>(b.first + column / 8 * b.further + row / 8 * 128 +
                                                     column % 8 * 16 + row % 8 * 2);
  }
  emulation::MultiplyColumns(kHalf<T>, d[0], kRows * kSums / 4, a, half_row, add);
}

// Of rows that are not there operand A has what makes no sense.
template <typename T, int kLine>
void StartProduct(float (&d)[16][4], SharedMatrix matrix, SharedColumns<kLine> b, bool add) {
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    const int lane = static_cast<int>(threadIdx.x) % 128,
              row = matrix.from + lane / 32 * 16 + lane % 32 / 4 + i % 2 * 8;
    a[i] = 0x7fff7fff;
    if (row < 0 || row >= matrix.rows) continue;
    const uint4 v = *reinterpret_cast<const uint4*>(matrix.first + (i / 2 * matrix.rows + row) * 16);
    std::memcpy(&a[i], reinterpret_cast<const char*>(&v) + lane % 4 * 4, sizeof a[i]);
  }
  StartProduct<T>(d, a, b, add);
}

}  // namespace jax_hadacore::cuda
