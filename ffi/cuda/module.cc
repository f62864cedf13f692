// module.cc: the Python module jax_hadacore._cuda.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>

#include "../handlers.h"
#include "../problem_binding.h"
#include "../quantization_binding.h"
#include "launch.h"
#include "measure.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace jax_hadacore;

namespace {

cuda::Buffers BuffersAt(uintptr_t x, uintptr_t y, uintptr_t workspace) {
  return {reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), reinterpret_cast<void*>(workspace)};
}

// What `measure` finds, by name.
template <typename F>
nb::dict TimesOf(const F& measure) {
  std::vector<cuda::Times> times;
  {
    nb::gil_scoped_release release;
    times = measure();
  }
  nb::dict d;
  for (const cuda::Times& t : times) d[t.name.c_str()] = t.milliseconds;
  return d;
}

nb::dict Measure(const Problem& problem, uintptr_t x, uintptr_t y, uintptr_t workspace, int sets, int launches,
                 int replays) {
  return TimesOf([&] { return cuda::Measure(problem, BuffersAt(x, y, workspace), sets, launches, replays); });
}

nb::dict MeasureCodes(const Problem& problem, const Quantization& quantization, uintptr_t x,
                      const QuantizedBuffers& results, int sets, int launches, int replays) {
  return TimesOf([&] {
    return cuda::MeasureCodes(problem, quantization, reinterpret_cast<const void*>(x), results, sets, launches,
                              replays);
  });
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.attr("ffi_api_version") = nb::make_tuple(kFfiApiVersion[0], kFfiApiVersion[1]);
  m.attr("toolkit") = CUDART_VERSION;
  m.def("hadamard_handler", [] { return nb::capsule(reinterpret_cast<void*>(JaxHadacoreHadamardCuda)); });
  m.def("quantize_handler", [] { return nb::capsule(reinterpret_cast<void*>(JaxHadacoreQuantizeCuda)); });
  m.def("driver_problem", cuda::DriverProblem, "Why the kernels cannot run with this driver, or ''.");
  m.def("device_problem", cuda::DeviceProblem, "Why the kernels cannot run on the current GPU, or ''.");

  BindProblem(m);
  BindQuantization(m);
  m.def("needs_workspace", cuda::NeedsWorkspace, "problem"_a,
        "Whether a transform needs a workspace of the operand's shape, of float32 or, for float64, of that.");
  m.def("takes_stride", cuda::TakesStride, "problem"_a, "Whether there are kernels for a problem's stride.");
  m.def("measure", Measure, "problem"_a, "x"_a, "y"_a, "workspace"_a = 0, "sets"_a = 1, "launches"_a = 1,
        "replays"_a = 10,
        "Milliseconds of the transform, a copy kernel and cudaMemcpyAsync on buffers at device addresses.");
  m.def(
      "transform",
      [](const Problem& problem, uintptr_t x, uintptr_t y, uintptr_t workspace) {
        cuda::TransformAndWait(problem, BuffersAt(x, y, workspace));
      },
      "problem"_a, "x"_a, "y"_a, "workspace"_a = 0, nb::call_guard<nb::gil_scoped_release>(),
      "Transforms buffers at device addresses on a stream of its own, and waits.");
  m.def("fuses_codes", cuda::FusesCodes, "problem"_a, "quantization"_a,
        "Whether one launch transforms rows and turns the results into codes.");
  m.def("measure_codes", MeasureCodes, "problem"_a, "quantization"_a, "x"_a, "results"_a, "sets"_a = 1,
        "launches"_a = 1, "replays"_a = 10,
        "Milliseconds of that, and of kernels that read and write as many bytes, on buffers at device addresses.");
  m.def(
      "quantize",
      [](const Problem& problem, const Quantization& quantization, uintptr_t x, const QuantizedBuffers& results) {
        cuda::QuantizeAndWait(problem, quantization, reinterpret_cast<const void*>(x), results);
      },
      "problem"_a, "quantization"_a, "x"_a, "results"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Transforms buffers at device addresses to codes on a stream of its own, and waits.");
}
