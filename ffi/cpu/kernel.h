// kernel.h: the transform for the instruction set that the including file is compiled for. Only isa_*.cc include it,
// and with it the headers that it is made of: everything in them is in an unnamed namespace, so that the linker cannot
// take one file's AVX-512 copy of a function for another's baseline copy.
//
// A row of n = a * b * 2^m elements has the butterflies first, in rows of 2^m, then the step of factor b, then that of
// a; signs are changed where elements are stored, before or after.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "butterflies.h"
#include "factors.h"
#include "hadamard.h"
#include "quantize.h"
#include "signs.h"

namespace jax_hadacore::cpu {
namespace {

// The functions of an instruction set (hadamard.h), for elements of one type and results of another, or of the same.
template <typename T, typename R = T>
struct Kernel {
  using A = typename T::Accumulator;
  using S = typename T::Storage;
  using Y = typename R::Storage;
  static constexpr bool kInResult = std::is_same_v<Y, A>;  // where the accumulators are

  static void Rows(const Problem& problem, Range rows, const void* x_, void* y_, const Memory& memory) {
    const int64_t n = problem.n, end = rows.last * n, most = RowsTogether(problem) * n;
    for (int64_t at = rows.first * n; at < end; at += most) {
      const int64_t count = end - at < most ? end - at : most;
      const S* x = static_cast<const S*>(x_) + at;
      Y* y = static_cast<Y*>(y_) + at;
      A* buffer = static_cast<A*>(memory.buffer);
      if constexpr (kInResult) buffer = y;
      if (SignsFirst(problem)) {
        // At the end of the result's memory, where wider results do not reach an element before it has been read.
        S* flipped = reinterpret_cast<S*>(y + count) - count;
        for (int64_t row = 0; row < count; row += n) Flip(x + row, n, problem.signs, flipped + row);
        x = flipped;
      }
      const S* near = x;  // what is to be prefetched
      if constexpr (!kInResult) near = y;
      if (problem.factor_count == 0) {
        PowerOfTwoRows<T>(x, n, count, buffer, near, Result(problem, y));
      } else {
        const int64_t inner = n / problem.factors[0].order;
        InnerRows(problem, x, count, buffer, near, memory);
        FactorStep<A>(problem, 0, memory).Apply(buffer, inner, {0, count / n * inner}, Exact(problem, y));
      }
      if (SignsLast(problem))
        for (int64_t row = 0; row < count; row += n) Flip(y + row, n, problem.signs, y + row);
    }
  }

  static void Parts(const Problem& problem, int64_t length, Range parts, const void* x_, void* y_,
                    const Memory& memory) {
    A* buffer = static_cast<A*>(memory.buffer);
    for (int64_t at = parts.first * length; at < parts.last * length; at += length) {
      const S* x = static_cast<const S*>(x_) + at;
      if (SignsFirst(problem)) {
        S* y = static_cast<S*>(y_) + at;
        Flip(x, length, problem.signs + at % problem.n / 32, y);
        x = y;
      }
      // What is to be prefetched is x: the result is too far away in time.
      if (problem.factor_count == 0) {
        Block<T>(x, buffer + at, x, length, Unscaled<A>{buffer + at});
      } else {
        InnerRows(problem, x, length, buffer + at, x, memory);
      }
    }
  }

  static void Columns(const Problem& problem, int64_t h, Range columns, void* y_, const Memory& memory) {
    A* buffer = static_cast<A*>(memory.buffer);
    S* y = static_cast<S*>(y_);
    const int64_t joined = PartsJoined(problem);
    while (columns.first < columns.last) {
      const int64_t column = columns.first % h, row = (columns.first - column) * joined, at = row + column;
      const int64_t left = columns.last - columns.first, count = h - column < left ? h - column : left;
      if (h * joined != problem.n) {
        Pass<kJoined>(buffer + at, h, count, Unscaled<A>{buffer + at});
      } else {
        if (problem.factor_count == 0) {
          Pass<kJoined>(buffer + at, h, count, Result(problem, y + at));
        } else {
          FactorStep<A>(problem, 0, memory).Apply(buffer + row, h, {column, column + count}, Exact(problem, y + row));
        }
        if (SignsLast(problem))
          for (int64_t i = at; i < at + joined * h; i += h)
            Flip(y + i, count, problem.signs + i % problem.n / 32, y + i);
      }
      columns.first += count;
    }
  }

 private:
  static bool SignsFirst(const Problem& problem) { return problem.signs && !problem.signs_last; }
  static bool SignsLast(const Problem& problem) { return problem.signs && problem.signs_last; }

  static Scaled<R> Result(const Problem& problem, Y* y) { return {y, static_cast<A>(problem.scale)}; }
  static ScaledExactly<Consecutive<R>> Exact(const Problem& problem, Y* y) { return {y, problem.scale}; }

  // `count` elements up to the step of the first factor, into the buffer. `result` is to be prefetched.
  static void InnerRows(const Problem& problem, const S* x, int64_t count, A* buffer, const S* result,
                        const Memory& memory) {
    const int64_t power = PowerOfTwo(problem);
    PowerOfTwoRows<Consecutive<T>>(x, power, count, buffer, result, Unscaled<A>{buffer});
    if (problem.factor_count == 2)
      FactorStep<A>(problem, 1, memory)
          .Apply(buffer, power, {0, count / problem.factors[1].order}, Unscaled<A>{buffer});
  }
};

// Transforms and quantises rows, as many at a time as the buffer holds. Results are float32, which do not come in
// pairs.
template <typename T>
void QuantizeRows(const Problem& problem, const Quantization& quantization, Range rows, const void* x,
                  const QuantizedBuffers& results, const Memory& memory) {
  if constexpr (std::is_same_v<typename T::Accumulator, float>) {
    const Quantizer quantizer(quantization, results);
    float* w = static_cast<float*>(memory.buffer);
    const int64_t n = problem.n, most = RowsQuantized(problem, quantization);
    for (int64_t row = rows.first; row < rows.last; row += most) {
      const int64_t count = std::min(most, rows.last - row);
      const auto* from = static_cast<const typename T::Storage*>(x) + row * n;
      Kernel<Consecutive<T>, Native<float>>::Rows(problem, {0, count}, from, w, memory);
      quantizer.Quantize(w, count * n, row * n);
    }
  }
}

// Calls function(T{}) for the element type T.
template <typename F>
void ForType(Dtype dtype, const F& function) {
  switch (dtype) {
    case Dtype::kF16: return function(Float16{});
    case Dtype::kBF16: return function(BFloat16{});
    case Dtype::kF32: return function(Native<float>{});
    case Dtype::kF64: return function(Native<double>{});
  }
}

constexpr Isa MakeIsa(const char* name) {
  return {name,
          [](const Problem& problem, Range rows, const void* x, void* y, const Memory& memory) {
            ForType(problem.dtype, [&](auto t) { Kernel<decltype(t)>::Rows(problem, rows, x, y, memory); });
          },
          [](const Problem& problem, int64_t length, Range parts, const void* x, void* y, const Memory& memory) {
            ForType(problem.dtype, [&](auto t) { Kernel<decltype(t)>::Parts(problem, length, parts, x, y, memory); });
          },
          [](const Problem& problem, int64_t h, Range columns, void* y, const Memory& memory) {
            ForType(problem.dtype, [&](auto t) { Kernel<decltype(t)>::Columns(problem, h, columns, y, memory); });
          },
          [](const Problem& problem, const Quantization& quantization, Range rows, const void* x,
             const QuantizedBuffers& results, const Memory& memory) {
            ForType(problem.dtype,
                    [&](auto t) { QuantizeRows<decltype(t)>(problem, quantization, rows, x, results, memory); });
          }};
}

}  // namespace
}  // namespace jax_hadacore::cpu
