// problem_binding.h: Dtype and Problem in a Python module. For module.cc only.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <vector>

#include "problem.h"

namespace jax_hadacore {

// Signs and values are at addresses of memory that the caller keeps; 0 for none.
inline void BindProblem(nanobind::module_& m) {
  using namespace nanobind::literals;
  nanobind::enum_<Dtype>(m, "Dtype")
      .value("float16", Dtype::kF16)
      .value("bfloat16", Dtype::kBF16)
      .value("float32", Dtype::kF32)
      .value("float64", Dtype::kF64);
  nanobind::class_<Problem>(m, "Problem")
      .def(
          "__init__",
          [](Problem* self, Dtype dtype, int64_t n, int64_t rows, double scale, const std::vector<int64_t>& orders,
             uintptr_t factors, uintptr_t matrix, uintptr_t signs, bool signs_last, bool signs_on_device,
             int64_t stride) {
            Problem problem{dtype, n, rows, scale};
            const auto* words = reinterpret_cast<const uint32_t*>(factors);
            for (const int64_t order : orders) {
              if (problem.factor_count == 2 || order < 1) throw std::invalid_argument("at most two orders, from 1 on");
              problem.factors[problem.factor_count++] = {order, words, reinterpret_cast<const double*>(matrix)};
              if (words) words += order * SignWords(order);
            }
            problem.signs = reinterpret_cast<const uint32_t*>(signs);
            problem.signs_last = signs_last;
            problem.signs_on_device = signs_on_device;
            problem.stride = stride;
            new (self) Problem(problem);
          },
          "dtype"_a, "n"_a, "rows"_a, "scale"_a = 1.0, "orders"_a = std::vector<int64_t>{}, "factors"_a = 0,
          "matrix"_a = 0, "signs"_a = 0, "signs_last"_a = false, "signs_on_device"_a = false, "stride"_a = 1);
}

}  // namespace jax_hadacore
