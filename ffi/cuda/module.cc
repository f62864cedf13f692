// module.cc: the Python module jax_hadacore._cuda.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>

#include "../handlers.h"
#include "launch.h"
#include "measure.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace jax_hadacore;

namespace {

cuda::Buffers BuffersAt(uintptr_t x, uintptr_t y, uintptr_t workspace) {
  return {reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), reinterpret_cast<void*>(workspace)};
}

nb::dict Measure(const Problem& problem, uintptr_t x, uintptr_t y, uintptr_t workspace, int sets, int launches,
                 int replays) {
  std::vector<cuda::Times> times;
  {
    nb::gil_scoped_release release;
    times = cuda::Measure(problem, BuffersAt(x, y, workspace), sets, launches, replays);
  }
  nb::dict d;
  for (const cuda::Times& t : times) d[t.name.c_str()] = t.milliseconds;
  return d;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.attr("ffi_api_version") = nb::make_tuple(kFfiApiVersion[0], kFfiApiVersion[1]);
  m.attr("toolkit") = CUDART_VERSION;
  m.def("hadamard_handler", [] { return nb::capsule(reinterpret_cast<void*>(JaxHadacoreHadamardCuda)); });
  m.def("driver_problem", cuda::DriverProblem, "Why the kernels cannot run with this driver, or ''.");
  m.def("device_problem", cuda::DeviceProblem, "Why the kernels cannot run on the current GPU, or ''.");

  nb::enum_<Dtype>(m, "Dtype")
      .value("float16", Dtype::kF16)
      .value("bfloat16", Dtype::kBF16)
      .value("float32", Dtype::kF32)
      .value("float64", Dtype::kF64);
  nb::class_<Problem>(m, "Problem")
      .def(
          "__init__",
          [](Problem* self, Dtype dtype, int64_t n, int64_t rows, double scale) {
            new (self) Problem{dtype, n, rows, scale};
          },
          "dtype"_a, "n"_a, "rows"_a, "scale"_a = 1.0);
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
}
