// quantization_binding.h: Code, Scale, Quantization and where its results go in a Python module. For module.cc only.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <new>

#include "quantization.h"

namespace jax_hadacore {

// A given scale and the results are at addresses of memory that the caller keeps; 0 for none.
inline void BindQuantization(nanobind::module_& m) {
  using namespace nanobind::literals;
  nanobind::enum_<Code>(m, "Code")
      .value("int8", Code::kInt8)
      .value("int4", Code::kInt4)
      .value("float8_e4m3fn", Code::kFloat8E4M3)
      .value("float8_e5m2", Code::kFloat8E5M2)
      .value("float4_e2m1fn", Code::kFloat4E2M1);
  nanobind::enum_<Scale>(m, "Scale")
      .value("float32", Scale::kFloat32)
      .value("float8_e8m0fnu", Scale::kE8M0)
      .value("float8_e4m3fn", Scale::kE4M3)
      .value("given", Scale::kGiven);
  nanobind::class_<Quantization>(m, "Quantization")
      .def(
          "__init__",
          [](Quantization* self, Code code, Scale scale, int64_t group, bool asymmetric, uintptr_t given) {
            new (self) Quantization{code, scale, group, asymmetric, reinterpret_cast<const float*>(given)};
          },
          "code"_a, "scale"_a, "group"_a, "asymmetric"_a = false, "given"_a = 0);
  nanobind::class_<QuantizedBuffers>(m, "QuantizedBuffers")
      .def(
          "__init__",
          [](QuantizedBuffers* self, uintptr_t codes, uintptr_t scales, uintptr_t zero_points) {
            new (self) QuantizedBuffers{reinterpret_cast<void*>(codes), reinterpret_cast<void*>(scales),
                                        reinterpret_cast<int8_t*>(zero_points)};
          },
          "codes"_a, "scales"_a = 0, "zero_points"_a = 0);
}

}  // namespace jax_hadacore
