// module.cc: the Python module jax_hadacore._cpu.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>

#include "../handlers.h"
#include "../problem_binding.h"
#include "../quantization_binding.h"
#include "call.h"
#include "hadamard.h"
#include "measure.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace jax_hadacore;

namespace {

nb::dict Measure(const Problem& problem, uintptr_t x, uintptr_t y, int threads, int repetitions) {
  cpu::Times times;
  {
    nb::gil_scoped_release release;
    times = cpu::Measure(problem, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), threads, repetitions);
  }
  nb::dict d;
  d["transform"] = times.transform;
  d["memcpy"] = times.memcpy;
  return d;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.attr("ffi_api_version") = nb::make_tuple(kFfiApiVersion[0], kFfiApiVersion[1]);
  m.def("hadamard_handler", [] { return nb::capsule(reinterpret_cast<void*>(JaxHadacoreHadamardCpu)); });
  m.def("quantize_handler", [] { return nb::capsule(reinterpret_cast<void*>(JaxHadacoreQuantizeCpu)); });
  m.def("isa", [] { return cpu::CurrentIsa().name; }, "The instruction set in use.");
  m.def("select_isa", cpu::SelectIsa, "name"_a,
        "Uses another instruction set, for tests; False when this build or this processor has none of that name.");
  BindProblem(m);
  BindQuantization(m);
  m.def("measure", Measure, "problem"_a, "x"_a, "y"_a, "threads"_a = 1, "repetitions"_a = 10,
        "Milliseconds of the transform and of memcpy on buffers at host addresses.");
  m.def(
      "transform",
      [](const Problem& problem, uintptr_t x, uintptr_t y, int64_t threads) {
        cpu::Transform(problem, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), threads);
      },
      "problem"_a, "x"_a, "y"_a, "threads"_a = 1, nb::call_guard<nb::gil_scoped_release>(),
      "Transforms buffers at host addresses on threads of its own.");
  m.def(
      "quantize",
      [](const Problem& problem, const Quantization& quantization, uintptr_t x, const QuantizedBuffers& results,
         int64_t threads) {
        cpu::TransformAndQuantize(problem, quantization, reinterpret_cast<const void*>(x), results, threads);
      },
      "problem"_a, "quantization"_a, "x"_a, "results"_a, "threads"_a = 1, nb::call_guard<nb::gil_scoped_release>(),
      "The same, quantised.");
}
