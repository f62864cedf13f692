// ptx.cuh: one function for each instruction that CUDA C++ has no name for, and the 16-bit types as those see them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace jax_hadacore::cuda {

// Tags for the element types whose bits travel packed in 32-bit registers.
struct F16 {};
struct BF16 {};

// Two floats rounded to nearest even and packed, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, F16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The two floats of a packed pair.
template <typename T>
__device__ __forceinline__ float2 Unpack(uint32_t packed) {
  float2 v;
  if constexpr (std::is_same_v<T, F16>) {
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(packed));
  } else {
    v.x = __uint_as_float(packed << 16);
    v.y = __uint_as_float(packed & 0xffff0000u);
  }
  return v;
}

// The larger of two, NaN where one is.
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// 1 / v, up to an error of 1 in the last place; 0 of an infinity.
__device__ __forceinline__ float ApproximateReciprocal(float v) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(v));
  return reciprocal;
}

// Two numbers rounded to nearest even, as int8 in the low half; what is too large becomes -128 or 127, and NaN 0. The
// low half of `rest` becomes the high one.
__device__ __forceinline__ uint32_t PackInt8(float low, float high, uint32_t rest = 0) {
  uint32_t packed;
  asm("{.reg .s32 low, high; cvt.rni.s32.f32 low, %1; cvt.rni.s32.f32 high, %2; cvt.pack.sat.s8.s32.b32 %0, high, low, "
      "%3;}"
      : "=r"(packed)
      : "f"(low), "f"(high), "r"(rest));
  return packed;
}

// Two float8 numbers, rounded to nearest even: what is too large becomes the largest, and NaN 0x7f. From sm_89 on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
__device__ __forceinline__ uint32_t ConvertToE4M3(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint32_t ConvertToE5M2(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}
#endif

// Waits until the launch before this one on the stream has ended and its results are visible. The launch may overlap
// with what comes before this call (programmatic dependent launch), so no kernel touches memory before it.
__device__ __forceinline__ void WaitForPreviousLaunch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The blocks of a cluster meet: what any of their threads did before it arrived has been done when one has waited.
__device__ __forceinline__ void ArriveAtCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void WaitForCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Makes the compiler read again what it has read from there before, where registers are short.
template <typename T>
__device__ __forceinline__ void KeepOutOfRegisters(T*& address) {
  asm volatile("" : "+l"(address));
}
// And compute again what follows from a value.
__device__ __forceinline__ void KeepOutOfRegisters(int& value) { asm volatile("" : "+r"(value)); }
// Keeps loads before it from what follows: ptxas may put off one of several until the first has been used.
__device__ __forceinline__ void IssueLoads() { __syncwarp(); }

// An address in shared memory.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress AddressOf(const void* shared) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes from global to shared memory, `kOffset` bytes behind both addresses; they are there after
// FinishCopies(), for the thread that copies. The offset is part of the instruction, which saves additions.
template <int kOffset>
__device__ __forceinline__ void StartCopy(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(AddressOf(shared)), "l"(global),
               "n"(kOffset), "n"(kOffset)
               : "memory");
}
__device__ __forceinline__ void FinishCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Asks for a line of global memory to be brought to the L2 cache.
__device__ __forceinline__ void Prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// v, as a value of its own in the compiler's eyes, which would copy registers again and again rather than keep two
// alike: a launch's blocks have one thread in their second and third dimensions, and it does not know.
template <int kDimension>
__device__ __forceinline__ uint32_t Opaque(uint32_t v) {
  return v ^ (kDimension ? blockDim.z : blockDim.y) ^ 1;
}

// The same address in a form that the compiler cannot tell for a kernel's parameter: of those it reads what it cannot
// place beforehand one lane after the other.
__device__ __forceinline__ const uint32_t* Generic(const uint32_t* parameter) {
  const uint32_t* address;
  asm("mov.b64 %0, %1;" : "=l"(address) : "l"(parameter));
  return address;
}

// 2 or 4 words, to an address in global memory aligned to their size. The compiler makes one instruction of such stores
// by itself, but not in a loop with a condition around them.
__device__ __forceinline__ void StoreWords(void* to, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void StoreWords(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// A barrier in shared memory, 8 bytes: a turn of it ends when as many arrivals as it was made for have been counted.
// What a thread did before it arrived has been done for those who have waited for the turn, numbered modulo 2.
__device__ __forceinline__ void MakeBarrier(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void ArriveAt(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the turn end only when so many bytes have been brought as well.
__device__ __forceinline__ void ArriveAndExpect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void WaitAt(SharedAddress barrier, int turn) {
  asm volatile(
      "{.reg .pred ended; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1; @!ended bra AGAIN;}" ::"r"(
          barrier),
      "r"(turn)
      : "memory");
}

// Brings the box that begins at these places of a tensor map to shared memory, and its bytes count at the barrier.
__device__ __forceinline__ void BringBox(SharedAddress to, const void* map, int a, int plane, int row,
                                         SharedAddress barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3,%4,%5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(0), "r"(a), "r"(plane), "r"(row), "r"(barrier)
      : "memory");
#endif
}

// Copies from global to shared memory, both aligned to 16 bytes, and arrives once that has been done.
__device__ __forceinline__ void StartCopies(void* shared, const void* global, int bytes, SharedAddress barrier) {
  ArriveAndExpect(barrier, bytes);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   AddressOf(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
               : "memory");
}

// Shared memory as the thread knows it, for products of warp groups, which read it past the caches of ordinary loads.
__device__ __forceinline__ void ShowToProducts() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void SyncWarp() { __syncwarp(); }

// The number of the thread's warp, which the compiler then knows to be that of all its lanes.
__device__ __forceinline__ int UniformWarp() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

// What only code for sm_90a has. A warp group is 4 warps, the first of which is a multiple of 4.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Changes how many registers each thread of the running warp group has. The block's warp groups share what it began
// with.
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Operand B of a warp group's product in shared memory, 16 rows of 128 columns: lines of kLine bytes of a row, those of
// consecutive rows one after the other, and the next kLine bytes of all rows `further` bytes on. In a line, bits 4 and
// up of an address are changed by bits 7 and up. Lines of 8 rows begin at a multiple of their size.
template <int kLine>
struct SharedColumns {
  static_assert(kLine == 64 || kLine == 128);
  static constexpr uint64_t kLayout = kLine == 128 ? 1 : 2;
  uint64_t descriptor;  // "Matrix descriptor format" of PTX

  __device__ __forceinline__ SharedColumns(SharedAddress first, int further)
      : descriptor(static_cast<uint64_t>(first >> 4 & 0x3fff) | static_cast<uint64_t>(further >> 4) << 16 |
                   static_cast<uint64_t>(8 * kLine >> 4) << 32 | kLayout << 62) {}
  // Those so many rows further on.
  __device__ __forceinline__ SharedColumns Below(int rows) const {
    SharedColumns below = *this;
    below.descriptor += rows * kLine >> 4;
    return below;
  }
};

// Operand A in shared memory: 64 rows of a matrix of `rows` rows, from row `from` on; what is not there has no meaning.
// A row's 8 elements are followed by those of the next row, and those of the last by the next 8 columns.
struct SharedMatrix {
  uint64_t descriptor;
  int rows;

  __device__ __forceinline__ SharedMatrix(SharedAddress first, int rows, int from)
      : descriptor(static_cast<uint64_t>((first + 16 * from) >> 4 & 0x3fff) | static_cast<uint64_t>(rows) << 16 |
                   static_cast<uint64_t>(8 * 16 >> 4) << 32),
        rows(rows) {}
  // Those so many columns further on.
  __device__ __forceinline__ SharedMatrix Right(int columns) const {
    SharedMatrix right = *this;
    right.descriptor += columns / 8 * rows;
    return right;
  }
};

// Operand B of 16 rows, of which 8 consecutive ones of a column are 16 bytes: those of 8 columns are one after the
// other, 128 bytes, those of the next 8 rows follow, and those of the next 8 columns are `further` bytes on.
struct SharedLines {
  uint32_t first, further;  // of a descriptor without swizzling

  __device__ __forceinline__ SharedLines(SharedAddress first, int further)
      : first((first >> 4 & 0x3fff) | 128 >> 4 << 16), further(static_cast<uint32_t>(further) >> 4) {}
  __device__ __forceinline__ SharedLines Further(int bytes) const {
    SharedLines lines = *this;
    lines.first += static_cast<uint32_t>(bytes) >> 4;
    return lines;
  }
  __device__ __forceinline__ uint64_t Descriptor() const { return static_cast<uint64_t>(further) << 32 | first; }
};

// Products of a warp group are asynchronous. The registers that they use may be touched before BeginProducts and after
// AwaitProducts. Each is followed by CommitProduct.
__device__ __forceinline__ void BeginProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void CommitProduct() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last kLeft.
template <int kLeft>
__device__ __forceinline__ void AwaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// d = A B, or with `add` d + A B. Each warp has 16 rows of the sums, of 8 columns each, as those of MatrixMultiplyAdd,
// and of A where that is in registers.
#define FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PRODUCT(type, add, operands, ...)                                                                             \
  asm volatile(                                                                                                       \
      "{.reg .pred add; setp.ne.b32 add, " add                                                                        \
      ", 0;"                                                                                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                    \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
      "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"  \
      "%56,%57,%58,%59,%60,%61,%62,%63}, " operands ";}"                                                              \
      : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9), FOUR(10), FOUR(11), \
        FOUR(12), FOUR(13), FOUR(14), FOUR(15)                                                                        \
      : __VA_ARGS__)
#define START(...)                        \
  if constexpr (std::is_same_v<T, F16>) { \
    PRODUCT("f16", __VA_ARGS__);          \
  } else {                                \
    PRODUCT("bf16", __VA_ARGS__);         \
  }
template <typename T, int kLine>
__device__ __forceinline__ void StartProduct(float (&d)[16][4], const uint32_t (&a)[4], SharedColumns<kLine> b,
                                             bool add) {
  START("%69", "{%64,%65,%66,%67}, %68, add, 1, 1, 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor),
        "r"(static_cast<int>(add)))
}
template <typename T, int kLine>
__device__ __forceinline__ void StartProduct(float (&d)[16][4], SharedMatrix a, SharedColumns<kLine> b, bool add) {
  START("%66", "%64, %65, add, 1, 1, 0, 1", "l"(a.descriptor), "l"(b.descriptor), "r"(static_cast<int>(add)))
}
#undef START
#undef PRODUCT
#undef FOUR

// The same for 8 columns for every 4 sums that d has, 12 to 96.
template <typename T, int kRows, int kSums>
__device__ __forceinline__ void StartProduct(float (&d)[kRows][kSums], const uint32_t (&a)[4], SharedLines b,
                                             bool add) {
  constexpr int kAll = kRows * kSums;
#define ONE(i) "+f"(d[(i) / kSums][(i) % kSums])
#define FOUR(i) ONE(i), ONE(i + 1), ONE(i + 2), ONE(i + 3)
#define TWELVE(i) FOUR(i), FOUR(i + 4), FOUR(i + 8)
#define TO_12 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11"
#define TO_20 TO_12 ",%12,%13,%14,%15,%16,%17,%18,%19"
#define TO_24 TO_20 ",%20,%21,%22,%23"
#define TO_52                                                                                                      \
  TO_24                                                                                                            \
  ",%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%" \
  "51"
#define TO_80                                                                                                      \
  TO_52                                                                                                            \
  ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%" \
  "79"
#define TO_96 TO_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define PRODUCT(type, columns, operands, add_at, ...)                                                       \
  asm volatile("{.reg .pred add; setp.ne.b32 add, " add_at ", 0; wgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." type "." type " {" operands ", add, 1, 1, 0;}"                                    \
               : __VA_ARGS__                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.Descriptor()), "r"(static_cast<int>(add)))
#define PRODUCTS(type)                                                                                              \
  if constexpr (kAll == 96) {                                                                                       \
    PRODUCT(type, "192", TO_96 "}, {%96,%97,%98,%99}, %100", "%101", TWELVE(0), TWELVE(12), TWELVE(24), TWELVE(36), \
            TWELVE(48), TWELVE(60), TWELVE(72), TWELVE(84));                                                        \
  } else if constexpr (kAll == 80) {                                                                                \
    PRODUCT(type, "160", TO_80 "}, {%80,%81,%82,%83}, %84", "%85", TWELVE(0), TWELVE(12), TWELVE(24), TWELVE(36),   \
            TWELVE(48), TWELVE(60), FOUR(72), FOUR(76));                                                            \
  } else if constexpr (kAll == 24) {                                                                                \
    PRODUCT(type, "48", TO_24 "}, {%24,%25,%26,%27}, %28", "%29", TWELVE(0), TWELVE(12));                           \
  } else if constexpr (kAll == 20) {                                                                                \
    PRODUCT(type, "40", TO_20 "}, {%20,%21,%22,%23}, %24", "%25", TWELVE(0), FOUR(12), FOUR(16));                   \
  } else {                                                                                                          \
    static_assert(kAll == 12);                                                                                      \
    PRODUCT(type, "24", TO_12 "}, {%12,%13,%14,%15}, %16", "%17", TWELVE(0));                                       \
  }
  if constexpr (std::is_same_v<T, F16>) {
    PRODUCTS("f16")
  } else {
    PRODUCTS("bf16")
  }
#undef PRODUCTS
#undef PRODUCT
#undef TO_96
#undef TO_80
#undef TO_52
#undef TO_24
#undef TO_20
#undef TO_12
#undef TWELVE
#undef FOUR
#undef ONE
}

// Stores four 8x8 matrices of 16-bit elements, transposed: a lane has of each the elements (g, 2 c) and (g, 2 c + 1),
// c = lane % 4 and g = lane / 4, and lanes 0 to 7, 8 to 15, ... name the columns' places.
__device__ __forceinline__ void StoreTransposed(SharedAddress column, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(column), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

#endif

// Four 8x8 matrices of 16-bit elements, whose rows lanes 0 to 7, 8 to 15, ... name, transposed: of each a lane gets
// the elements (2 c, g) and (2 c + 1, g), c = lane % 4 and g = lane / 4.
__device__ __forceinline__ void LoadMatrices(uint32_t (&d)[4], SharedAddress row) {
  asm("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(row)
      : "memory");
}

// The same, not transposed.
__device__ __forceinline__ void LoadLines(uint32_t (&d)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
}

// A B + c on the tensor cores, by one warp: A 16x16 (row-major fragment), B 16x8 (column-major), float32 sums.
template <typename T>
__device__ __forceinline__ void MatrixMultiplyAdd(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                  const float (&c)[4]) {
  if constexpr (std::is_same_v<T, F16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

}  // namespace jax_hadacore::cuda
