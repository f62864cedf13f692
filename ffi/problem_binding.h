// problem_binding.h: Dtype and Problem in a Python module. For module.cc only.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <new>

#include "problem.h"

namespace jax_hadacore {

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
          [](Problem* self, Dtype dtype, int64_t n, int64_t rows, double scale) {
            new (self) Problem{dtype, n, rows, scale};
          },
          "dtype"_a, "n"_a, "rows"_a, "scale"_a = 1.0);
}

}  // namespace jax_hadacore
