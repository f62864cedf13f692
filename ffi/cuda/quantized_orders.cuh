// quantized_orders.cuh: aligned 16-bit rows of k * 2^m elements, m >= 7, whose results become codes: the transform of
// order_rows.cuh in 16 columns, all of a row at once, so that its sums stay in registers until their scales are known.
#pragma once

#include "codes.cuh"
#include "order_rows.cuh"

namespace jax_hadacore::cuda {

// A row's 128 elements of each a are neighbours, and so are those of a warp's 16 a's. A lane has the sums of two a's,
// 8 apart, of each 8 vectors: 4 neighbours, 16 elements apart from the next 4, with its quad's other lanes between.
constexpr int kQuadVectors = 8, kQuadVector = 4, kQuadApart = 4 * kQuadVector, kOfA = kQuadVectors * kQuadApart;
using QuadResults = Results<kQuadVector>[kQuadVectors];

// Of the words of a quad's lanes, the i-th to the i-th lane.
__device__ __forceinline__ void TransposeQuad(uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = Lane() & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(i & distance)) {
        uint32_t &low = words[i], &high = words[i + distance];
        const uint32_t others = __shfl_xor_sync(kWarp, upper ? low : high, distance);
        (upper ? low : high) = others;
      }
  }
}

// Stores an a's codes: a lane those of neighbouring vectors.
template <typename Q>
__device__ __forceinline__ void StoreOfA(uint8_t* codes, const QuadResults& results,
                                         const Group (&groups)[kQuadVectors], bool inside) {
  const int lane = Lane() % 4;
  if constexpr (Q::Bytes(kQuadVector) == 4) {
#pragma unroll
    for (int first = 0; first < kQuadVectors; first += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = Q::Word(results[first + i], groups[first + i]);
      TransposeQuad(words);
      if (inside) StoreWords(codes + Q::Bytes((first + lane) * kQuadApart), words[0], words[1], words[2], words[3]);
    }
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = (Q::Word(results[i], groups[i]) & 0xffff) | Q::Word(results[i + 4], groups[i + 4]) << 16;
    TransposeQuad(words);
    const auto low = [&](int i) { return (words[i] & 0xffff) | words[i + 1] << 16; };
    const auto high = [&](int i) { return words[i] >> 16 | (words[i + 1] & 0xffff0000u); };
    if (inside) {
      StoreWords(codes + Q::Bytes(lane * kQuadApart), low(0), low(2));
      StoreWords(codes + Q::Bytes((lane + 4) * kQuadApart), high(0), high(2));
    }
  }
}

// Scales the lane's sums of an a, and finds how far they reach.
template <typename Q>
__device__ __forceinline__ void KeepOfA(const Q& quantizer, QuadResults& results, Span (&spans)[kQuadVectors],
                                        const GroupSums<16>& sums, int half) {
#pragma unroll
  for (int i = 0; i < kQuadVectors; ++i) {
    const float (&even)[4] = sums.of[2 * i], (&odd)[4] = sums.of[2 * i + 1];
    spans[i] = quantizer.Keep(results[i], {even[2 * half], even[2 * half + 1], odd[2 * half], odd[2 * half + 1]});
  }
}

// Stores the codes of a row that has one scale, of which other warps have sums, too: exchange(span) stores a warp's
// span and gives each lane a warp's, so that all lanes have all. The lane's a's are a and a + 8, and `first` is the
// array's number of the first of a's elements.
template <typename Exchange>
__device__ __forceinline__ void StoreCodesOfRow(const GroupSums<16>& sums, const Work& work, int64_t row, int a,
                                                int64_t first, const Exchange& exchange) {
  ForFormat<Formats::kOfRows>(work, [&](auto quantizer) {
    QuadResults results[2];
    Span span;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Span of_vectors[kQuadVectors];
      KeepOfA(quantizer, results[half], of_vectors, sums, half);
#pragma unroll
      for (int i = 1; i < kQuadVectors; ++i) quantizer.Include(of_vectors[0], of_vectors[i]);
      if (a + 8 * half < work.order) quantizer.Include(span, of_vectors[0]);
    }
    quantizer.IncludeAll(span);
    Span of_row[1] = {exchange(span)};
    quantizer.IncludeAll(of_row[0]);
    Group group[1];
    quantizer.FindGroups(group, of_row, [&](int) { return row; }, [&](int) { return a == 0 && Lane() == 0; });
    Group groups[kQuadVectors];
#pragma unroll
    for (Group& of_vector : groups) of_vector = group[0];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      StoreOfA<decltype(quantizer)>(quantizer.Codes(first + 8 * half * kOfA), results[half], groups,
                                    a + 8 * half < work.order);
  });
}

// The same where every 2^group_bits elements have a scale, 16 to 128.
template <Formats kFormats>
__device__ __forceinline__ void StoreCodesOfGroups(const GroupSums<16>& sums, const Work& work, int a, int64_t first) {
  ForFormat<kFormats>(work, [&](auto quantizer) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      QuadResults results;
      Span spans[kQuadVectors];
      KeepOfA(quantizer, results, spans, sums, half);
      const int vectors = (1 << work.group_bits) / kQuadApart;  // of a group
#pragma unroll
      for (int distance = 1; distance < kQuadVectors; distance *= 2)
        if (distance < vectors)
#pragma unroll
          for (int i = 0; i < kQuadVectors; ++i)
            if (!(i & distance)) {
              quantizer.Include(spans[i], spans[i + distance]);
              spans[i + distance] = spans[i];
            }
      const bool inside = a + 8 * half < work.order;
      const int64_t first_of_a = first + 8 * half * kOfA;
      Group groups[kQuadVectors];
      quantizer.FindGroupsOfLanes(
          groups, spans, 4, [&](int i) { return (first_of_a + i * kQuadApart) >> work.group_bits; },
          [&](int i) { return inside && (i & (vectors - 1)) == 0; });
      StoreOfA<decltype(quantizer)>(quantizer.Codes(first_of_a), results, groups, inside);
    }
  });
}

// A block transforms a row at a time, of those that it takes in turn with the others, and has a warp for each 16 a's. A
// row comes while the one before it is worked on, to a buffer of its own where there is room for two.
template <typename T, Formats kFormats>
__global__ void __launch_bounds__(2 * kMostQuantizedOrder, 1)
    QuantizedOrderRows(const __grid_constant__ WorkAndWords<kQuantizedWords> given) {
  constexpr int kColumnBits = 4, kZeros = 1 << kColumnBits;
  static_assert(1 << kColumnBits == kQuantizedColumns);
  static_assert(kZeros * sizeof(uint4) + kMostQuantizedOrder / 16 * sizeof(Span) <= kQuantizedExtra);
  const Work& work = given.work;
  extern __shared__ float4 shared_memory[];
  const int n = static_cast<int>(work.n), thread = static_cast<int>(threadIdx.x);
  uint16_t* const staged = reinterpret_cast<uint16_t*>(shared_memory);
  uint4* const behind = reinterpret_cast<uint4*>(staged + work.ring * n);
  Span* const spans = reinterpret_cast<Span*>(behind + kZeros);
  if (thread < kZeros) behind[thread] = make_uint4(0, 0, 0, 0);

  const auto bring = [&](int64_t row, uint16_t* to) {
    const uint16_t* const from = static_cast<const uint16_t*>(work.x) + row * n;
    const GroupPlace<kColumnBits> place;
#pragma unroll 4
    for (int i = kGroup * thread; i < n; i += kGroup * static_cast<int>(blockDim.x))
      StartCopy<0>(to + place(i), from + i);
  };
  WaitForPreviousLaunch();
  bring(blockIdx.x, staged);
  const int first_a = 16 * UniformWarp(), own_a = first_a + Lane() / 4;
  int buffer = 0;
  for (int64_t row = blockIdx.x; row < work.count;) {
    const int64_t next = row + work.runs;
    FinishCopies();
    __syncthreads();
    const int other = work.ring == 1 ? 0 : n - buffer;
    if (work.ring > 1 && next < work.count) bring(next, staged + other);
    GroupSums<16> sums;
    TransformTask<T, kColumnBits>(sums, staged + buffer, behind, Generic(given.words), work.order, first_a, 0, 1);
    if (work.ring == 1) {
      __syncthreads();
      if (next < work.count) bring(next, staged);
    }
    const int64_t first = row * n + own_a * kOfA;
    if constexpr (kFormats == Formats::kOfRows) {
      StoreCodesOfRow(sums, work, row, own_a, first, [&](const Span& span) {
        const int lane = Lane();
        if (lane == 0) spans[thread / 32] = span;
        __syncthreads();
        return spans[lane < static_cast<int>(blockDim.x) / 32 ? lane : 0];
      });
    } else {
      StoreCodesOfGroups<kFormats>(sums, work, own_a, first);
    }
    row = next, buffer = other;
  }
}

template <typename T>
Kernel QuantizedOrdersKernel(Formats formats) {
  return KernelFor(formats, [](auto known) {
    const auto function = &QuantizedOrderRows<T, known()>;
    Kernel kernel = {"order rows to codes", reinterpret_cast<const void*>(function), 2 * kMostQuantizedOrder, 0};
    kernel.words = kQuantizedWords;
    return kernel;
  });
}

}  // namespace jax_hadacore::cuda
